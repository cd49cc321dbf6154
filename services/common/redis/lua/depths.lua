-- Counts the jobs of each stream that no gateway runs yet.
--
-- KEYS[i]  a model's streams
-- ARGV[1]  group
-- Returns one count per stream.
local depths = {}
for i, stream in ipairs(KEYS) do
  local waiting = redis.call('XLEN', stream)
  local summary = redis.pcall('XPENDING', stream, ARGV[1])
  if not summary.err and summary[4] then
    for _, owner in ipairs(summary[4]) do
      if string.sub(owner[1], 1, 2) == 'g:' then waiting = waiting - tonumber(owner[2]) end
    end
  end
  depths[i] = waiting
end
return depths
