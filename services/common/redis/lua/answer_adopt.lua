-- Makes somebody else the owner of an answer that is still its former owner's and has not ended.
--
-- KEYS[1]  the answer's request (hash)
-- ARGV[1]  former owner
-- ARGV[2]  new owner
-- Returns 1 if it is the new owner's now.
local found = redis.call('HMGET', KEYS[1], 'owner', 'state')
if found[1] ~= ARGV[1] or found[2] ~= 'open' then return 0 end
redis.call('HSET', KEYS[1], 'owner', ARGV[2])
return 1
