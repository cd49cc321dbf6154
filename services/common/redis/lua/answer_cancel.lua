-- Asks an answer's owner to end it.
--
-- KEYS[1]  the answer's request (hash)
-- Returns 1 if it has not ended yet.
if redis.call('HGET', KEYS[1], 'state') ~= 'open' then return 0 end
redis.call('HSET', KEYS[1], 'cancelled', '1')
return 1
