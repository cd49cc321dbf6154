-- Forgets consumers of processes that are long gone and own nothing. One that comes back is created anew.
--
-- KEYS[1]  stream
-- ARGV[1]  group
-- ARGV[2]  ms without a sign of life
-- Returns how many were forgotten.
local stream, group, silence = KEYS[1], ARGV[1], tonumber(ARGV[2])
local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, group)
if consumers.err then return 0 end
local forgotten = 0
for _, info in ipairs(consumers) do
  local fields = {}
  for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
  if fields['pending'] == 0 and fields['idle'] > silence then
    redis.call('XGROUP', 'DELCONSUMER', stream, group, fields['name'])
    forgotten = forgotten + 1
  end
end
return forgotten
