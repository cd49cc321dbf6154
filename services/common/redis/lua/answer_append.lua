-- Adds events at the end of an answer, if they come next and the answer is still the owner's. Without events it says
-- how the answer stands. Either way it is kept for longer.
--
-- KEYS[1]   the answer's request (hash)
-- KEYS[2]   its events (stream; event N has the id 0-(N + 1))
-- ARGV[1]   owner
-- ARGV[2]   position of the first event
-- ARGV[3]   number of the attempt that they come from
-- ARGV[4]   state of the answer after them: open, done or failed
-- ARGV[5]   ms until it is forgotten
-- ARGV[6..] events
-- Returns {standing, number of events there}; standing: 'owned', 'cancelled', 'lost' to another owner, or 'gone'.
local request, events, owner, position = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[2])
local found = redis.call('HMGET', request, 'owner', 'state', 'cancelled')
if not found[1] then return {'gone', 0} end
if found[1] ~= owner then return {'lost', 0} end

local length = redis.call('XLEN', events)
if length == position and #ARGV > 5 then
  for i = 6, #ARGV do
    length = length + 1
    redis.call('XADD', events, '0-' .. length, 'event', ARGV[i])
  end
  redis.call('HSET', request, 'state', ARGV[4], 'attempt', ARGV[3])
end
redis.call('PEXPIRE', request, ARGV[5])
redis.call('PEXPIRE', events, ARGV[5])
return {found[3] and 'cancelled' or 'owned', length}
