-- Adds to the costs of a day, once for each batch of a writer.
--
-- KEYS[1]   costs of the day (hash): KEY_ID MODEL WHAT -> a whole number; @WRITER -> its last batch
-- ARGV[1]   writer
-- ARGV[2]   number of its batch, from 1
-- ARGV[3]   unix time in s at which the day is forgotten
-- ARGV[4..] field, amount to add, ...
local costs, writer, batch = KEYS[1], '@' .. ARGV[1], tonumber(ARGV[2])
if tonumber(redis.call('HGET', costs, writer) or '0') < batch then
  redis.call('HSET', costs, writer, ARGV[2])
  for i = 4, #ARGV, 2 do
    redis.call('HINCRBY', costs, ARGV[i], ARGV[i + 1])
  end
end
redis.call('EXPIREAT', costs, ARGV[3])
return 'OK'
