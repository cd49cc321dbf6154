-- Renews an owner's lease on entries. A scheduler keeps what it owns; a gateway also takes over from any scheduler.
--
-- KEYS[1]   stream
-- ARGV[1]   group
-- ARGV[2]   consumer
-- ARGV[3..] entry ids
-- Returns the ids that are lost: no longer handed out, or owned by somebody else.
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local is_gateway = string.sub(consumer, 1, 2) == 'g:'

local function may_claim(id)
  local pending = redis.pcall('XPENDING', stream, group, id, id, 1)
  if pending.err or not pending[1] then return false end
  local owner = pending[1][2]
  return owner == consumer or (is_gateway and string.sub(owner, 1, 2) == 's:')
end

local lost = {}
for i = 3, #ARGV do
  local id = ARGV[i]
  if not may_claim(id) or #redis.call('XCLAIM', stream, group, consumer, 0, id, 'JUSTID') == 0 then
    lost[#lost + 1] = id
  end
end
return lost
