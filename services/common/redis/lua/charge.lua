-- Counts what reservations have used so far, and renews their leases or ends them. (meters.lua says what the keys are.)
-- One that goes on although its lease ran out, or Redis has forgotten it, is there again; the first is charged as a
-- whole beside that, since its gateway stood still for too long.
--
-- ARGV[1]  lease in ms
-- ARGV[2]  1: leases may run out
-- then for each reservation: its id, 1 if it has ended, its number of meters, and for each of these its name, window in
-- ms, what was reserved, what is used so far in all

-- Holds what such a one may still use.
local function hold_again(first, last, forgotten)
  local left = {}
  for i = first, last, 4 do
    local meter, used = load(ARGV[i], tonumber(ARGV[i + 1])), tonumber(ARGV[i + 3])
    local rest = tonumber(ARGV[i + 2]) - used
    hold(meter, rest)
    if forgotten then count(meter, used, now) end
    left[#left + 1] = meter.name
    left[#left + 1] = meter.window
    left[#left + 1] = rest
  end
  return left
end

-- Moves what was used since the last time from held to used. The meters of a record are in the order of its arguments.
local function move(left, first)
  for m = 1, #left, 3 do
    local i = first + (m - 1) / 3 * 4
    local reserved, used = tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
    local news = used - (reserved - left[m + 2])
    local meter = load(left[m], left[m + 1])
    hold(meter, -news)
    count(meter, news, now)
    left[m + 2] = left[m + 2] - news
  end
end

local function finish(id, left)
  for m = 1, #left, 3 do hold(load(left[m], left[m + 1]), -left[m + 2]) end
  redis.call('HDEL', reservations, id)
  redis.call('ZREM', leases, id)
end

local function charge(id, ended, first, last)
  local record = redis.call('HGET', reservations, id)
  local left = {}
  if record and record ~= '' then
    left = cmsgpack.unpack(record)
    move(left, first)
  elseif not ended then
    left = hold_again(first, last, not record)
  end
  if ended then return finish(id, left) end
  redis.call('HSET', reservations, id, cmsgpack.pack(left))
  redis.call('ZADD', leases, now + tonumber(ARGV[1]), id)
end

expire_leases(ARGV[2])
local i = 3
while i <= #ARGV do
  local first = i + 3
  local last = first + 4 * tonumber(ARGV[i + 2]) - 1
  charge(ARGV[i], ARGV[i + 1] == '1', first, last)
  i = last + 1
end
save()
