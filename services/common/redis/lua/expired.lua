-- Lists entries whose owner's lease ran out, oldest first.
--
-- KEYS[1]  stream
-- ARGV[1]  group
-- ARGV[2]  lease in ms
-- ARGV[3]  where to begin: '-', or '(' and the last id of the page before
-- ARGV[4]  the most entries to look at
-- Returns {entries looked at, last id looked at, {{entry id, owner, idle ms, {field, value}}, ...}}.
local stream, group, lease, from, count = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local pending = redis.pcall('XPENDING', stream, group, 'IDLE', lease, from, '+', count)
if pending.err then
  if string.find(pending.err, 'NOGROUP', 1, true) then return {0, '', {}} end
  return pending
end
local entries, last = {}, ''
for _, item in ipairs(pending) do
  last = item[1]
  local found = redis.call('XRANGE', stream, last, last)
  if found[1] then
    entries[#entries + 1] = {last, item[2], item[3], found[1][2]}
  else
    redis.call('XACK', stream, group, last) -- deleted by hand: nothing is left to place
  end
end
return {#pending, last, entries}
