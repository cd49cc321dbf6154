-- Counts the jobs of each stream that no gateway runs yet, and says how old the oldest of them is.
--
-- KEYS[i]  a model's streams
-- ARGV[1]  group
-- Returns for each stream {count, age of the oldest in ms}.
local group, time = ARGV[1], redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function age(entry_id)
  return now - tonumber(string.match(entry_id, '^%d+'))
end

local function last_handed_out(stream)
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local fields = {}
    for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
    if fields['name'] == group then return '(' .. fields['last-delivered-id'] end
  end
  return '-'
end

local depths = {}
for i, stream in ipairs(KEYS) do
  local waiting, oldest = redis.call('XLEN', stream), 0
  local summary = redis.pcall('XPENDING', stream, group)
  if not summary.err and summary[4] then
    for _, owner in ipairs(summary[4]) do
      if string.sub(owner[1], 1, 2) == 'g:' then
        waiting = waiting - tonumber(owner[2])
      else
        local first = redis.call('XPENDING', stream, group, '-', '+', 1, owner[1])[1]
        if first then oldest = math.max(oldest, age(first[1])) end
      end
    end
  end
  if waiting > 0 then
    local next = redis.call('XRANGE', stream, last_handed_out(stream), '+', 'COUNT', 1)[1]
    if next then oldest = math.max(oldest, age(next[1])) end
  end
  depths[i] = {waiting, oldest}
end
return depths
