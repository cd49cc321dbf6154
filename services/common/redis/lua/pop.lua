-- Hands waiting jobs to a scheduler: the highest priority first, the oldest first within a priority.
--
-- KEYS[i]  a model's streams, highest priority first
-- ARGV[1]  group
-- ARGV[2]  consumer that takes them
-- ARGV[3]  the most jobs to take
-- Returns {seconds, microseconds} of the clock that makes entry ids; then for each stream {{entry id, {field, value}}, ...}.
local group, consumer, left = ARGV[1], ARGV[2], tonumber(ARGV[3])

local function read(stream)
  return redis.pcall('XREADGROUP', 'GROUP', group, consumer, 'COUNT', left, 'STREAMS', stream, '>')
end

local function take(stream)
  local reply = read(stream)
  if reply and reply.err and string.find(reply.err, 'NOGROUP', 1, true) then
    -- First use, or Redis lost the group: from 0, so that what is already there is handed out.
    redis.call('XGROUP', 'CREATE', stream, group, '0', 'MKSTREAM')
    reply = read(stream)
  end
  return reply
end

local taken = {}
for i, stream in ipairs(KEYS) do
  local entries = {}
  if left > 0 then
    local reply = take(stream)
    if reply and reply.err then return reply end
    if reply then entries = reply[1][2] end
    left = left - #entries
  end
  taken[i] = entries
end
return {redis.call('TIME'), unpack(taken)}
