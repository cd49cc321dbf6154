-- Makes a scheduler the owner of entries whose lease is still run out.
--
-- KEYS[1]   stream
-- ARGV[1]   group
-- ARGV[2]   consumer
-- ARGV[3]   lease in ms
-- ARGV[4..] entry ids
-- Returns the ids it owns now.
local stream, group, consumer, lease = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local taken = {}
for i = 4, #ARGV do
  if #redis.call('XCLAIM', stream, group, consumer, lease, ARGV[i], 'JUSTID') == 1 then
    taken[#taken + 1] = ARGV[i]
  end
end
return taken
