-- Ends entries: XACK, then XDEL. Says nothing against those that are gone already,
-- or were none.
-- A scheduler may end what it owns; a gateway also what waits, or what a scheduler owns.
--
-- KEYS[1]   stream
-- ARGV[1]   group
-- ARGV[2]   consumer
-- ARGV[3..] entry ids
-- Returns how many were there and are gone now.
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local is_gateway = string.sub(consumer, 1, 2) == 'g:'

local function may_end(id)
  local pending = redis.pcall('XPENDING', stream, group, id, id, 1)
  local owner = not pending.err and pending[1] and pending[1][2]
  return owner == consumer or (is_gateway and (not owner or string.sub(owner, 1, 2) == 's:'))
end

local ended = 0
for i = 3, #ARGV do
  local id = ARGV[i]
  if may_end(id) then
    -- pcall: what is no entry id must not keep the others.
    redis.pcall('XACK', stream, group, id)
    local gone = redis.pcall('XDEL', stream, id)
    ended = ended + (type(gone) == 'number' and gone or 0)
  end
end
return ended
