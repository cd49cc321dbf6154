-- Forgets an answer that its owner could not begin.
--
-- KEYS[1]  the answer's request (hash)
-- KEYS[2]  its events (stream)
-- ARGV[1]  owner
-- Returns how many keys were there.
if redis.call('HGET', KEYS[1], 'owner') ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1], KEYS[2])
