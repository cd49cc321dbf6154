-- Puts a key in the place of the one with its id, unless that was revoked or is gone.
--
-- KEYS[1]  the keys (hash)
-- ARGV     id, key (JSON)
-- Returns 1 if it has.
local before = redis.call('HGET', KEYS[1], ARGV[1])
if not before or cjson.decode(before).revoked then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
