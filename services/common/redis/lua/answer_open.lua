-- Begins the record of an answer, unless there is one. One that ended in an error makes room: a caller may try again.
--
-- KEYS[1]  the answer's request (hash)
-- KEYS[2]  its events (stream)
-- ARGV[1]  owner
-- ARGV[2]  request
-- ARGV[3]  fingerprint of what the caller sent
-- ARGV[4]  ms until it is forgotten
-- Returns nothing if it has begun, else the fingerprint of the one that is there.
local request, events = KEYS[1], KEYS[2]
local found = redis.call('HMGET', request, 'fingerprint', 'state')
if found[1] and found[2] ~= 'failed' then return found[1] end
redis.call('DEL', request, events)
redis.call('HSET', request, 'owner', ARGV[1], 'request', ARGV[2], 'fingerprint', ARGV[3], 'state', 'open', 'attempt', 0)
redis.call('PEXPIRE', request, ARGV[4])
return false
