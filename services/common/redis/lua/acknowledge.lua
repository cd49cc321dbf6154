-- Ends an entry: XACK, then XDEL. Says nothing against an entry that is gone already.
-- A scheduler may end what it owns; a gateway also what waits, or what a scheduler owns.
--
-- KEYS[1]  stream
-- ARGV[1]  group
-- ARGV[2]  consumer
-- ARGV[3]  entry id
-- Returns 1 if the entry was there and is gone now.
local stream, group, consumer, id = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local is_gateway = string.sub(consumer, 1, 2) == 'g:'

local pending = redis.pcall('XPENDING', stream, group, id, id, 1)
local owner = not pending.err and pending[1] and pending[1][2]
local may_end = owner == consumer or (is_gateway and (not owner or string.sub(owner, 1, 2) == 's:'))
if not may_end then return 0 end
redis.call('XACK', stream, group, id)
return redis.call('XDEL', stream, id)
