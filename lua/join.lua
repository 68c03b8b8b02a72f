-- join: a buyer waits in line for units that come back.
--
-- KEYS   those of shared/change.lua
-- ARGV   1 caller (shared/partition.lua), 2 raw id that the order will have, 3 raw buyer id,
--        4 fingerprint of the order, 5 units at most, 6 archived rounds of the sale in which
--        PostgreSQL does not have the order
-- Reply  { 'ok', now_ms, pseq, standing, word, facts, position (1 is next; '' outside the line) }
--          'done'       in line now
--          'already'    was in line before, with these or other wishes
--          'replayed'   has the order that this wish became; facts: its record
--          'archived'   more rounds of the sale are archived: PostgreSQL must be asked first
--          'no_line'    the round has none
--          'not_open'   facts: opens_ms
--          'paused' | 'closed'
--          'available'  units are for sale
--          'order_limit' | 'buyer_limit'   facts: limit and units held, packed >I6I6
--          'full'       as many wait as may
--        { 'damaged', what is wrong with the round }
--        { 'fenced', reason } or { 'expired', now_ms }: nothing written
-- Flags  none: refused when memory is full

local LIMIT = '>I6I6'
local LINE_MAX = 100000

local change, refusal = open_change(ARGV[1])
if not change then
  return refusal
end
local round = change.round
local id, buyer, units = ARGV[2], ARGV[3], tonumber(ARGV[5])
local state = state_of(round, change.partition.now_ms)

local function reply(word, facts)
  local rank = redis.call('ZRANK', KEYS[7], buyer)
  return answer(change, word, facts or '', rank and whole(rank + 1) or '')
end

local order = redis.call('HGET', KEYS[10], id)
if order then
  return reply('replayed', order)
elseif redis.call('ZSCORE', KEYS[7], buyer) then
  return reply('already')
elseif tonumber(ARGV[6]) < change.sale.archived_rounds then
  -- The order may have left with a round; a second one must not get its id.
  return reply('archived')
elseif not has(round.policy, HAS_LINE) then
  return reply('no_line')
elseif state == 'scheduled' then
  return reply('not_open', whole(round.opens_ms))
elseif state ~= 'open' then
  return reply(state)
end
local who = member(change, buyer) or { units = 0, acceptances = 0 }
if units > round.order_limit then
  return reply('order_limit', struct.pack(LIMIT, round.order_limit, who.units))
elseif who.units + units > round.buyer_limit
    or who.acceptances >= round.buyer_limit + SPARE_ACCEPTANCES then
  return reply('buyer_limit', struct.pack(LIMIT, round.buyer_limit, who.units))
elseif round.remaining > 0 and round.n_line == 0 then
  return reply('available')
elseif round.n_line >= LINE_MAX then
  return reply('full')
end

note(change, 'join', id, units, buyer, nil, ARGV[4])
change.in_line = { whole(round.seq), buyer }
change.wishes = { buyer, struct.pack(WISH, id, ARGV[4], units) }
round.n_line = round.n_line + 1
return commit(change) or reply('done')
