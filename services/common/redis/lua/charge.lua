-- Counts what reservations have used so far, and renews their leases or ends them. (meters.lua says what the keys are.)
-- One that Redis has forgotten is there again if it goes on; one whose lease ran out is charged already.
--
-- ARGV[1]  lease in ms
-- ARGV[2]  1: leases may run out
-- then for each reservation: its id, 1 if it has ended, its number of meters, and for each of these its name, window in
-- ms, what was reserved, what is used so far in all
local function record_of(id, first, last)
  local record = redis.call('HGET', reservations, id)
  if record == '' then return nil end
  if record then return cmsgpack.unpack(record) end
  local left = {}
  for i = first, last, 4 do
    hold(ARGV[i], tonumber(ARGV[i + 2]))
    left[#left + 1] = ARGV[i]
    left[#left + 1] = tonumber(ARGV[i + 1])
    left[#left + 1] = tonumber(ARGV[i + 2])
  end
  return left
end

-- Moves what was used since the last time from held to used. The meters of a record are in the order of its arguments.
local function move(left, first)
  for m = 1, #left, 3 do
    local i = first + (m - 1) / 3 * 4
    local reserved, used = tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
    local news = used - (reserved - left[m + 2])
    hold(left[m], -news)
    count(left[m], left[m + 1], news, now)
    left[m + 2] = left[m + 2] - news
  end
end

local function release(id, left)
  for m = 1, #left, 3 do hold(left[m], -left[m + 2]) end
  redis.call('HDEL', reservations, id)
  redis.call('ZREM', leases, id)
end

expire_leases(ARGV[2])
local i = 3
while i <= #ARGV do
  local id, ended = ARGV[i], ARGV[i + 1] == '1'
  local first = i + 3
  local last = first + 4 * tonumber(ARGV[i + 2]) - 1
  local known = redis.call('HEXISTS', reservations, id) == 1
  if known or not ended then
    local left = record_of(id, first, last)
    if left then move(left, first) end
    if ended then
      release(id, left or {})
    else
      redis.call('HSET', reservations, id, left and cmsgpack.pack(left) or '')
      redis.call('ZADD', leases, left and now + tonumber(ARGV[1]) or now + LAST_WORDS_MS, id)
    end
  end
  i = last + 1
end
keep()
