-- purchase: decides on up to 128 purchases from up to 16 rounds, one after the other.
--
-- KEYS   1 meta, 2 journal, then for each round: round, buyers, board, holds, sale, orders, buyers of
--        the sale
-- ARGV   1 caller (shared/partition.lua)
--        2 number of the key that signs receipts (0: none)
--        3 items, 51 bytes each: index of the round (from 0), raw order id, fingerprint and raw
--          buyer id as they end a record, quantity, durability (what an acceptance will survive),
--          redeem (1: a receipt proves that an earlier epoch accepted this, and it was lost:
--          decided like any other, but also while the round is paused, or closed and not
--          settled), archived rounds of the sale in which PostgreSQL does not have the order
-- Reply  { 'ok', now_ms, pseq, n, standing × n rounds, then a word and its facts for each item }
--          'accepted' | 'replayed'   the order's record
--          'mismatch'                the key made an order from another request
--          'archived'                archived rounds of the sale: PostgreSQL must be asked first
--          'not_open'                opens_ms
--          'paused' | 'closed' | 'sold_out'
--          'order_limit' | 'buyer_limit'   limit and units held, packed >I6I6
--          'insufficient'            units left
--          'damaged'                 what is wrong with the round; its items only
--          'left_out'                would be accepted, but another item of 'all' is not
--        A round that is damaged has '' for its standing.
--        { 'fenced', reason } or { 'expired', now_ms }: nothing was read further, nothing written
-- Flags  none: refused as a whole when memory is full

local ITEM = '>Bc16c24I4BBI4'
local ITEM_BYTES = 51
-- What an operator may want of a round that still redeems.
local REDEEMS = { live = true, paused = true, closed = true }

-- Read ---------------------------------------------------------------------------------------

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end

-- Those whom a limit counts: of the round, or of the sale. `owner` has their number.
local function members_of(owner, key)
  -- Buyers that are asked about, what those have who got something here, and who that is.
  return { owner = owner, key = key, asked = {}, units = {}, acceptances = {}, served = {} }
end

local rounds, sales, crowds = {}, {}, {}
for base = 3, #KEYS, 7 do
  local sale_key, orders_key = KEYS[base + 4], KEYS[base + 5]
  local sale = sales[sale_key]
  if sale == nil then
    sale = read_sale(sale_key) or false
    if sale then
      sale.orders_key = orders_key
      sale.intact = has_orders(sale, orders_key)
      -- ids that are asked about, records made here, and the same as arguments
      sale.asked, sale.made, sale.new = {}, {}, {}
    end
    sales[sale_key] = sale
  end
  local round = read_round(KEYS[base])
  if not round then
    round = { damage = 'round' }
  elseif not sale then
    round = { damage = 'sale' }
  elseif not sale.intact then
    round = { damage = 'orders' }
  elseif not intact(round, KEYS[base + 1], KEYS[base + 2], KEYS[base + 3]) then
    round = { damage = 'buyers, board or holds' }
  else
    round.board_key, round.holds_key = KEYS[base + 2], KEYS[base + 3]
    round.sale = sale
    -- Places of confirmed orders, and deadlines of held ones.
    round.places, round.deadlines, round.holds = {}, {}, round.hold_ms > 0
    round.state = state_of(round, partition.now_ms)
    if has(round.policy, LIMIT_OVER_SALE) then
      sale.members = sale.members or members_of(sale, KEYS[base + 6])
      round.members = sale.members
      if redis.pcall('HLEN', KEYS[base + 6]) ~= sale.n_buyers then
        round = { damage = 'buyers of the sale' }
      end
    else
      round.members = members_of(round, KEYS[base + 1])
    end
  end
  rounds[#rounds + 1] = round
end

-- A table for each thing of all items, not one for each item: every purchase goes through here.
local packed_items = ARGV[3]
local n_items = #packed_items / ITEM_BYTES
local of_round, ids, requests, buyers = {}, {}, {}, {}
local quantities, durabilities, redeems, archives = {}, {}, {}, {}
-- Where the item's order and buyer are among those asked about.
local order_slots, buyer_slots = {}, {}
local parse, sub = struct.unpack, string.sub
for i = 1, n_items do
  local index
  index, ids[i], requests[i], quantities[i], durabilities[i], redeems[i], archives[i] =
    parse(ITEM, packed_items, (i - 1) * ITEM_BYTES + 1)
  local buyer = sub(requests[i], 9)
  buyers[i] = buyer
  local round = rounds[index + 1]
  of_round[i] = round
  if not round.damage then
    local asked = round.sale.asked
    local slot = #asked + 1
    asked[slot], order_slots[i] = ids[i], slot
    asked = round.members.asked
    slot = #asked + 1
    asked[slot], buyer_slots[i] = buyer, slot
  end
end

for _, sale in pairs(sales) do
  if sale and sale.intact and #sale.asked > 0 then
    sale.records = redis.call('HMGET', sale.orders_key, unpack(sale.asked))
  end
end
for _, round in ipairs(rounds) do
  local members = round.members
  if members and #members.asked > 0 and not members.known then
    members.known = redis.call('HMGET', members.key, unpack(members.asked))
    crowds[#crowds + 1] = members
  end
end

-- Decide -------------------------------------------------------------------------------------

local LIMIT = '>I6I6'
local pseq, receipt_key = partition.pseq + 1, tonumber(ARGV[2])
local pack = struct.pack
-- For each acceptance: its round (its index in the entry, once that is known), id and record.
local journal, life = {}, false

local function decide(i)
  local round = of_round[i]
  if round.damage then
    return 'damaged', round.damage
  end
  local sale, id, request = round.sale, ids[i], requests[i]
  local record = sale.records[order_slots[i]] or sale.made[id]
  if record then
    -- fingerprint and buyer are its last 24 bytes
    if sub(record, -24) == request then
      return 'replayed', record
    end
    return 'mismatch', ''
  end
  -- The order may have left with a round: nothing is decided before that is known.
  if archives[i] < sale.archived_rounds then
    return 'archived', whole(sale.archived_rounds)
  end
  if round.state == 'scheduled' then
    return 'not_open', whole(round.opens_ms)
  elseif round.state ~= 'open' and not (redeems[i] == 1 and REDEEMS[round.intent]) then
    return round.state, ''
  end
  local buyer, quantity = buyers[i], quantities[i]
  local members = round.members
  local units, acceptances = members.units[buyer], members.acceptances[buyer]
  local served = units ~= nil
  if not served then
    local known = members.known[buyer_slots[i]]
    if known then
      units, acceptances = parse(BUYER, known)
    else
      units, acceptances = 0, 0
    end
  end
  if quantity > round.order_limit then
    return 'order_limit', pack(LIMIT, round.order_limit, units)
  end
  if units + quantity > round.buyer_limit
      or acceptances >= round.buyer_limit + SPARE_ACCEPTANCES then
    return 'buyer_limit', pack(LIMIT, round.buyer_limit, units)
  end
  local remaining = round.remaining
  if remaining == 0 or round.n_line > 0 and redeems[i] == 0 then
    -- What comes back is for those who wait in line.
    return 'sold_out', ''
  elseif remaining < quantity then
    return 'insufficient', whole(remaining)
  end

  local seq, held = round.seq + 1, round.holds
  round.seq, round.remaining = seq, remaining - quantity
  if held then
    round.held = round.held + quantity
  else
    round.sold = round.sold + quantity
  end
  if not served then
    members.served[#members.served + 1] = buyer
    if not members.known[buyer_slots[i]] then
      members.owner.n_buyers = members.owner.n_buyers + 1
    end
  end
  members.units[buyer], members.acceptances[buyer] = units + quantity, acceptances + 1

  local durability = durabilities[i]
  local head = round.head
  if round.head_of ~= durability then
    local status = held and STATUS.held or STATUS.confirmed
    head = pack(RECORD_HEAD, held and VERSION_RECORD_LIFE or VERSION, status, status, durability,
      receipt_key, round.number, partition.epoch)
    round.head, round.head_of = head, durability
  end
  local middle = round.middle
  if round.middle_of ~= quantity then
    middle = pack(RECORD_MIDDLE, pseq, quantity, round.price, partition.now_ms)
    if held then
      middle = middle .. pack(RECORD_LIFE, round.hold_ms, 0, 0, 0)
    end
    round.middle, round.middle_of = middle, quantity
  end
  record = head .. pack('>I6', seq) .. middle .. request
  sale.made[id] = record
  local new = sale.new
  local at = #new
  new[at + 1], new[at + 2] = id, record
  if held then
    local deadlines = round.deadlines
    at = #deadlines
    deadlines[at + 1], deadlines[at + 2] = whole(partition.now_ms + round.hold_ms), id
    life = true
  else
    local places = round.places
    at = #places
    places[at + 1], places[at + 2] = seq, id
  end
  at = #journal
  journal[at + 1], journal[at + 2], journal[at + 3] = round, id, record
  return 'accepted', record
end

local reply = { 'ok', whole(partition.now_ms), '', whole(#rounds) }
local replied = 4 + #rounds

-- The standings that the reply tells.
local function tell_standings()
  for i, round in ipairs(rounds) do
    reply[4 + i] = round.damage and '' or pack_standing(round, round.sale, partition.now_ms)
  end
end

local together = ARGV[4] == 'all'
if together then
  tell_standings()
end
for i = 1, n_items do
  reply[replied + 1], reply[replied + 2] = decide(i)
  replied = replied + 2
end
if together then
  local refused = false
  for at = 5 + #rounds, #reply, 2 do
    refused = refused or reply[at] ~= 'accepted' and reply[at] ~= 'replayed'
  end
  if refused then
    for at = 5 + #rounds, #reply, 2 do
      if reply[at] == 'accepted' then
        reply[at], reply[at + 1] = 'left_out', ''
      end
    end
    reply[3] = whole(partition.pseq)
    return reply
  end
end

-- Write --------------------------------------------------------------------------------------

if #journal > 0 then
  local counters, events = {}, {}
  for _, round in ipairs(rounds) do
    if not round.damage and #round.places + #round.deadlines > 0 then
      local index = #counters
      round.index = string.char(index)
      round.n_board = round.n_board + #round.places / 2
      round.n_holds = round.n_holds + #round.deadlines / 2
      if ends_now(round) then
        events[#events + 1] = close_by_itself(round, index)
      end
      counters[index + 1] = pack_counters(round)
    end
  end
  for at = 1, #journal, 3 do
    journal[at] = journal[at].index
  end
  if not append(partition, table.concat(counters), table.concat(journal), table.concat(events),
      life) then
    return { 'fenced', 'journal' }
  end
  for _, sale in pairs(sales) do
    if sale and #sale.new > 0 then
      sale.n_orders = sale.n_orders + #sale.new / 2
      redis.call('HSET', sale.orders_key, unpack(sale.new))
      redis.call('HSET', sale.key, 'n_orders', whole(sale.n_orders))
    end
  end
  for _, members in ipairs(crowds) do
    local changed = {}
    for i, buyer in ipairs(members.served) do
      changed[2 * i - 1] = buyer
      changed[2 * i] = pack(BUYER, members.units[buyer], members.acceptances[buyer])
    end
    if #changed > 0 then
      redis.call('HSET', members.key, unpack(changed))
      if not members.owner.seq then
        -- Of the sale: a round's number is written with its other fields.
        redis.call('HSET', members.owner.key, 'n_buyers', whole(members.owner.n_buyers))
      end
    end
  end
  for _, round in ipairs(rounds) do
    if round.index then
      if #round.places > 0 then
        redis.call('ZADD', round.board_key, unpack(round.places))
      end
      if #round.deadlines > 0 then
        redis.call('ZADD', round.holds_key, unpack(round.deadlines))
      end
      write_round(partition, round)
    end
  end
end

reply[3] = whole(partition.pseq)
tell_standings()
return reply
