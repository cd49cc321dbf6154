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
local loaded = {} -- the meters of this call, by name; `save` writes them back

local function bucket_at(meter, at) return math.floor(at / (meter.window / BUCKETS)) end

-- Ms until a bucket has left the window.
local function leaves_in(meter, bucket) return (bucket + BUCKETS + 1) * (meter.window / BUCKETS) - now end

local function used_in(meter, bucket)
  local stored = redis.call('HGET', meters, meter.name .. ':' .. bucket)
  return (tonumber(stored or nil) or 0) + (meter.added[bucket] or 0)
end

-- Forgets what has left the window.
local function slide(meter)
  local first = bucket_at(meter, now) - BUCKETS
  if meter.oldest >= first then return end
  for bucket = meter.oldest, math.min(first - 1, meter.newest) do
    local gone = used_in(meter, bucket)
    if gone > 0 then
      meter.used = meter.used - gone
      redis.call('HDEL', meters, meter.name .. ':' .. bucket)
    end
  end
  meter.oldest = first
  meter.changed = true
end

local function load(name, window)
  if loaded[name] then return loaded[name] end
  local fields = {name .. ':used', name .. ':held', name .. ':oldest', name .. ':newest'}
  local stored = redis.call('HMGET', meters, unpack(fields))
  for i = 1, 4 do stored[i] = tonumber(stored[i] or nil) end
  local meter = {
    name = name, window = window, added = {}, changed = false,
    used = stored[1] or 0, held = stored[2] or 0, oldest = stored[3], newest = stored[4],
  }
  if meter.oldest then slide(meter) end
  loaded[name] = meter
  return meter
end

local function hold(meter, amount)
  if amount == 0 then return end
  meter.held = meter.held + amount
  meter.changed = true
end

-- Counts an amount as used at that time. A window of 0 ms counts nothing.
local function count(meter, amount, at)
  if meter.window == 0 or amount == 0 then return end
  local bucket = bucket_at(meter, at)
  if bucket < bucket_at(meter, now) - BUCKETS then return end
  meter.added[bucket] = (meter.added[bucket] or 0) + amount
  meter.used = meter.used + amount
  meter.oldest = math.min(meter.oldest or bucket, bucket)
  meter.newest = math.max(meter.newest or bucket, bucket)
  meter.changed = true
end

local function save_meter(meter)
  local name = meter.name
  for bucket, amount in pairs(meter.added) do redis.call('HINCRBY', meters, name .. ':' .. bucket, amount) end
  local sums = {name .. ':used', meter.used, name .. ':held', meter.held}
  local span = meter.oldest and {name .. ':oldest', meter.oldest, name .. ':newest', meter.newest} or {}
  for _, value in ipairs(span) do sums[#sums + 1] = value end
  redis.call('HSET', meters, unpack(sums))
end

local function save()
  for _, meter in pairs(loaded) do
    if meter.changed then save_meter(meter) end
  end
end

local function keep()
  for _, key in ipairs({meters, reservations, leases}) do redis.call('PEXPIRE', key, KEEP_MS) end
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
        local meter = load(left[m], left[m + 1])
        hold(meter, -left[m + 2])
        count(meter, left[m + 2], at)
      end
      redis.call('HSET', reservations, id, '')
      redis.call('ZADD', leases, now + LAST_WORDS_MS, id)
    end
  end
end
