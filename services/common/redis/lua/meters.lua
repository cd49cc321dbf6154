-- What the scripts of limits share: it stands before their own text. A meter counts what was used within a sliding
-- window, and beside that what running requests hold. A window is 120 buckets long; what was used counts until the
-- whole bucket that it fell in has left the window: up to one bucket too long, never too short.
--
-- KEYS[1]  meters, a hash. Of each meter NAME: `NAME:used` and `NAME:held`, the sums; `NAME:BUCKET`, what was used in
--          that bucket; `NAME:oldest` and `NAME:newest`, the buckets there may be
-- KEYS[2]  reservations, a hash: id -> name, window in ms and amount still held of each meter (cmsgpack);
--          empty: its lease ran out and it is charged
-- KEYS[3]  leases, a sorted set of reservation ids by the ms at which they run out
local meters, reservations, leases = KEYS[1], KEYS[2], KEYS[3]
local BUCKETS = 120
local LAST_WORDS_MS = 600000 -- so long is remembered that a lease ran out: its gateway may wake up
local KEEP_MS = 2764800000 -- 32 days: longer than the longest window
local MOST_EXPIRED = 100 -- in one call

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function get(name, field) return tonumber(redis.call('HGET', meters, name .. ':' .. field) or nil) end
local function set(name, field, value) redis.call('HSET', meters, name .. ':' .. field, value) end
local function add(name, field, amount) redis.call('HINCRBY', meters, name .. ':' .. field, amount) end

local function bucket_at(window, at) return math.floor(at / (window / BUCKETS)) end

-- Ms until a bucket has left the window.
local function leaves_in(window, bucket) return (bucket + BUCKETS + 1) * (window / BUCKETS) - now end

local function hold(name, amount)
  if amount ~= 0 then add(name, 'held', amount) end
end

-- Counts an amount as used at that time. A window of 0 ms counts nothing.
local function count(name, window, amount, at)
  if window == 0 or amount == 0 then return end
  local bucket = bucket_at(window, at)
  if bucket < bucket_at(window, now) - BUCKETS then return end
  add(name, bucket, amount)
  add(name, 'used', amount)
  local oldest, newest = get(name, 'oldest'), get(name, 'newest')
  if not oldest or bucket < oldest then set(name, 'oldest', bucket) end
  if not newest or bucket > newest then set(name, 'newest', bucket) end
end

-- Forgets what has left the window. Returns what is used within it.
local function slide(name, window)
  local used = get(name, 'used') or 0
  local oldest = get(name, 'oldest')
  if not oldest then return used end
  local first = bucket_at(window, now) - BUCKETS
  if oldest >= first then return used end
  local gone = 0
  for bucket = oldest, math.min(first - 1, get(name, 'newest')) do
    local amount = get(name, bucket)
    if amount then
      gone = gone + amount
      redis.call('HDEL', meters, name .. ':' .. bucket)
    end
  end
  set(name, 'oldest', first)
  if gone > 0 then add(name, 'used', -gone) end
  return used - gone
end

-- Charges all that is still held by reservations whose lease ran out, at the time when it did. Not just after Redis was
-- away, since then gateways that live have not renewed theirs either.
local function expire_leases(may_expire)
  if may_expire ~= '1' then return end
  local expired = redis.call('ZRANGEBYSCORE', leases, '-inf', now, 'WITHSCORES', 'LIMIT', 0, MOST_EXPIRED)
  for i = 1, #expired, 2 do
    local id, at = expired[i], tonumber(expired[i + 1])
    local record = redis.call('HGET', reservations, id)
    if not record or record == '' then
      redis.call('HDEL', reservations, id)
      redis.call('ZREM', leases, id)
    else
      local left = cmsgpack.unpack(record)
      for m = 1, #left, 3 do
        hold(left[m], -left[m + 2])
        count(left[m], left[m + 1], left[m + 2], at)
      end
      redis.call('HSET', reservations, id, '')
      redis.call('ZADD', leases, now + LAST_WORDS_MS, id)
    end
  end
end

local function keep()
  for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, KEEP_MS) end
end
