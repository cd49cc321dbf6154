-- Reserves on all meters of a request, or on none. (meters.lua says what the keys are.)
--
-- ARGV[1]  reservation id
-- ARGV[2]  lease in ms
-- ARGV[3]  1: leases may run out
-- then for each meter: its name, limit, window in ms, what to hold until the end, what to count as used now
-- Returns {1 if reserved, {used, held, ms until nothing is used, ms until this fits} of each meter}, used and held as
-- they were before. 0 ms: it fits; -1: it waits for what running requests hold.
local function until_unused(name, window, used, held)
  if window == 0 or used + held == 0 then return 0 end
  if held > 0 then return leaves_in(window, bucket_at(window, now)) end -- as if it were used now
  return leaves_in(window, get(name, 'newest'))
end

local function until_free(name, window, amount)
  if amount <= 0 then return 0 end
  local freed = 0
  local oldest = get(name, 'oldest')
  if window == 0 or not oldest then return -1 end
  for bucket = oldest, get(name, 'newest') do
    freed = freed + (get(name, bucket) or 0)
    if freed >= amount then return leaves_in(window, bucket) end
  end
  return -1
end

local function take(id, lease)
  local left = {}
  for i = 4, #ARGV, 5 do
    local name, window, held, counted = ARGV[i], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4])
    hold(name, held)
    count(name, window, counted, now)
    if held > 0 then
      left[#left + 1] = name
      left[#left + 1] = window
      left[#left + 1] = held
    end
  end
  if #left > 0 then
    redis.call('HSET', reservations, id, cmsgpack.pack(left))
    redis.call('ZADD', leases, now + lease, id)
  end
  keep()
end

expire_leases(ARGV[3])
local fits = 1
local reply = {0}
for i = 4, #ARGV, 5 do
  local name, limit, window = ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
  local used, held = slide(name, window), get(name, 'held') or 0
  local excess = used + held + tonumber(ARGV[i + 3]) + tonumber(ARGV[i + 4]) - limit
  if excess > 0 then fits = 0 end
  reply[#reply + 1] = {used, held, until_unused(name, window, used, held), until_free(name, window, excess)}
end
if fits == 1 then take(ARGV[1], tonumber(ARGV[2])) end
reply[1] = fits
return reply
