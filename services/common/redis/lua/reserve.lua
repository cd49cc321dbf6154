-- Reserves on all meters of a request, or on none; once they are, writes the request to a stream, if one is named.
-- (meters.lua says what the first three keys are.)
--
-- KEYS[4]  that stream, or no key
-- ARGV[1]  reservation id
-- ARGV[2]  lease in ms
-- ARGV[3]  1: leases may run out
-- ARGV[4]  the entry's field
-- ARGV[5]  its value
-- then for each meter: its name, limit, window in ms, what to hold until the end, what to count as used now
-- Returns {1 if reserved, the entry's id or '', {used, held, ms until nothing is used, ms until this fits} of each
-- meter}, used and held as they were before. 0 ms: it fits; -1: it waits for what running requests hold.
local function until_unused(meter)
  if meter.window == 0 or meter.used + meter.held == 0 then return 0 end
  if meter.held > 0 then return leaves_in(meter, bucket_at(meter, now)) end -- as if it were used now
  return leaves_in(meter, meter.newest)
end

local function until_free(meter, amount)
  if amount <= 0 then return 0 end
  if meter.window == 0 or not meter.oldest then return -1 end
  local freed = 0
  for bucket = meter.oldest, meter.newest do
    freed = freed + used_in(meter, bucket)
    if freed >= amount then return leaves_in(meter, bucket) end
  end
  return -1
end

local function take(id, lease, claims)
  local left = {}
  for _, claim in ipairs(claims) do
    hold(claim.meter, claim.hold)
    count(claim.meter, claim.count, now)
    if claim.hold > 0 then
      left[#left + 1] = claim.meter.name
      left[#left + 1] = claim.meter.window
      left[#left + 1] = claim.hold
    end
  end
  if #left > 0 then
    redis.call('HSET', reservations, id, cmsgpack.pack(left))
    redis.call('ZADD', leases, now + lease, id)
  end
end

expire_leases(ARGV[3])
local fits = 1
local reply, claims = {0, ''}, {}
for i = 6, #ARGV, 5 do
  local meter = load(ARGV[i], tonumber(ARGV[i + 2]))
  local claim = {meter = meter, hold = tonumber(ARGV[i + 3]), count = tonumber(ARGV[i + 4])}
  local excess = meter.used + meter.held + claim.hold + claim.count - tonumber(ARGV[i + 1])
  if excess > 0 then fits = 0 end
  claims[#claims + 1] = claim
  reply[#reply + 1] = {meter.used, meter.held, until_unused(meter), until_free(meter, excess)}
end
if fits == 1 then take(ARGV[1], tonumber(ARGV[2]), claims) end
save()
if fits == 1 then
  keep()
  if KEYS[4] then reply[2] = redis.call('XADD', KEYS[4], '*', ARGV[4], ARGV[5]) end
end
reply[1] = fits
return reply
