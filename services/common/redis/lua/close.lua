-- Ends entries whose lease is still run out: XACK, then XDEL.
--
-- KEYS[1]   stream
-- ARGV[1]   group
-- ARGV[2]   consumer
-- ARGV[3]   lease in ms
-- ARGV[4..] entry ids
-- Returns the ids that were closed.
local stream, group, consumer, lease = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local closed = {}
for i = 4, #ARGV do
  local id = ARGV[i]
  if #redis.call('XCLAIM', stream, group, consumer, lease, id, 'JUSTID') == 1 then
    redis.call('XACK', stream, group, id)
    redis.call('XDEL', stream, id)
    closed[#closed + 1] = id
  end
end
return closed
