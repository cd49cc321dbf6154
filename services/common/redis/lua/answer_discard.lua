-- Forgets an answer that its owner could not begin. Those who read it already get the error, for a moment.
--
-- KEYS[1]  the answer's request (hash)
-- KEYS[2]  its events (stream)
-- ARGV[1]  owner
-- ARGV[2]  event that is the error
-- ARGV[3]  ms that it stays
-- Returns 1 if the answer was the owner's.
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1], KEYS[2])
redis.call('XADD', KEYS[2], '0-1', 'event', ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return 1
