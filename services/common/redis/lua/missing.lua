-- Says which entries a stream does not hold, whoever owns them.
--
-- KEYS[1]  stream
-- ARGV     entry ids
-- Returns the ids that are not there.
local missing = {}
for _, id in ipairs(ARGV) do
  if #redis.call('XRANGE', KEYS[1], id, id) == 0 then missing[#missing + 1] = id end
end
return missing
