-- purchase: decides on up to 128 purchases from up to 16 rounds, one after the other.
--
-- KEYS   1 meta, 2 journal, then for each round: round, buyers, board, sale, orders
-- ARGV   1 caller (shared/partition.lua)
--        2 number of the key that signs receipts (0: none)
--        3 items, 51 bytes each: index of the round (from 0), raw order id, raw buyer id,
--          quantity, fingerprint, durability (what an acceptance will survive), redeem (1: a
--          receipt proves that an earlier epoch accepted this, and it was lost: decided like any
--          other, but also while the round is paused, or closed and not settled), archived rounds
--          of the sale in which PostgreSQL does not have the order
-- Reply  { 'ok', now_ms, pseq, n, standing × n rounds, then a word and its facts for each item }
--          'accepted' | 'replayed'   the order's record
--          'mismatch'                the key made an order from another request
--          'archived'                archived rounds of the sale: PostgreSQL must be asked first
--          'not_open'                opens_ms
--          'paused' | 'closed' | 'sold_out'
--          'order_limit' | 'buyer_limit'   limit and units held, packed >I6I6
--          'insufficient'            units left
--          'damaged'                 what is wrong with the round; its items only
--        A round that is damaged has '' for its standing.
--        { 'fenced', reason } or { 'expired', now_ms }: nothing was read further, nothing written
-- Flags  none: refused as a whole when memory is full

local ITEM = '>Bc16c16I4c8BBI4'
local ITEM_BYTES = 51
-- What an operator may want of a round that still redeems.
local REDEEMS = { live = true, paused = true, closed = true }
local SPARE_ACCEPTANCES = 8

-- Read ---------------------------------------------------------------------------------------

local partition, refusal = enter(ARGV[1])
if not partition then
  return refusal
end

local rounds, sales = {}, {}
for base = 3, #KEYS, 5 do
  local sale_key, orders_key = KEYS[base + 3], KEYS[base + 4]
  local sale = sales[sale_key]
  if sale == nil then
    sale = read_sale(sale_key) or false
    if sale then
      sale.orders_key = orders_key
      sale.intact = has_orders(sale, orders_key)
      sale.asked, sale.orders, sale.new = {}, {}, {}
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
  elseif not intact(round, KEYS[base + 1], KEYS[base + 2]) then
    round = { damage = 'buyers or board' }
  else
    round.buyers_key, round.board_key = KEYS[base + 1], KEYS[base + 2]
    round.sale, round.asked, round.buyers, round.dirty, round.new = sale, {}, {}, {}, {}
    round.state = state_of(round, partition.now_ms)
  end
  rounds[#rounds + 1] = round
end

local items = {}
for at = 1, #ARGV[3], ITEM_BYTES do
  local index, id, buyer, quantity, fingerprint, durability, redeem, archive =
    struct.unpack(ITEM, ARGV[3], at)
  local round = rounds[index + 1]
  items[#items + 1] = {
    index = index, round = round, id = id, buyer = buyer, quantity = quantity,
    fingerprint = fingerprint, durability = durability, redeem = redeem == 1, archive = archive,
  }
  if not round.damage then
    local asked = round.sale.asked
    asked[#asked + 1] = id
    round.asked[#round.asked + 1] = buyer
  end
end

for _, sale in pairs(sales) do
  if sale and sale.intact and #sale.asked > 0 then
    local records = redis.call('HMGET', sale.orders_key, unpack(sale.asked))
    for i, id in ipairs(sale.asked) do
      sale.orders[id] = records[i]
    end
  end
end
for _, round in ipairs(rounds) do
  if not round.damage and #round.asked > 0 then
    local packed = redis.call('HMGET', round.buyers_key, unpack(round.asked))
    for i, id in ipairs(round.asked) do
      local units, acceptances = 0, 0
      if packed[i] then
        units, acceptances = struct.unpack(BUYER, packed[i])
      end
      round.buyers[id] = { units = units, acceptances = acceptances, known = packed[i] and true }
    end
  end
end

-- Decide -------------------------------------------------------------------------------------

local LIMIT = '>I6I6'
local pseq, receipt_key = partition.pseq + 1, tonumber(ARGV[2])
local accepted = {}

local function decide(item)
  local round = item.round
  if round.damage then
    return 'damaged', round.damage
  end
  local sale = round.sale
  local record = sale.orders[item.id]
  if record then
    -- fingerprint and buyer are its last 24 bytes
    if string.sub(record, -24) == item.fingerprint .. item.buyer then
      return 'replayed', record
    end
    return 'mismatch', ''
  end
  -- The order may have left with a round: nothing is decided before that is known.
  if item.archive < sale.archived_rounds then
    return 'archived', whole(sale.archived_rounds)
  end
  if round.state == 'scheduled' then
    return 'not_open', whole(round.opens_ms)
  elseif round.state ~= 'open' and not (item.redeem and REDEEMS[round.intent]) then
    return round.state, ''
  end
  local buyer = round.buyers[item.buyer]
  if item.quantity > round.order_limit then
    return 'order_limit', struct.pack(LIMIT, round.order_limit, buyer.units)
  end
  if buyer.units + item.quantity > round.buyer_limit
      or buyer.acceptances >= round.buyer_limit + SPARE_ACCEPTANCES then
    return 'buyer_limit', struct.pack(LIMIT, round.buyer_limit, buyer.units)
  end
  if round.remaining == 0 then
    return 'sold_out', ''
  elseif round.remaining < item.quantity then
    return 'insufficient', whole(round.remaining)
  end

  round.seq = round.seq + 1
  round.remaining = round.remaining - item.quantity
  round.sold = round.sold + item.quantity
  round.n_board = round.n_board + 1
  if not buyer.known then
    buyer.known = true
    round.n_buyers = round.n_buyers + 1
  end
  buyer.units = buyer.units + item.quantity
  buyer.acceptances = buyer.acceptances + 1
  round.dirty[item.buyer] = true
  record = struct.pack(RECORD, VERSION, STATUS.confirmed, STATUS.confirmed, item.durability,
    receipt_key, round.number, partition.epoch, round.seq, pseq, item.quantity, round.price,
    partition.now_ms, item.fingerprint, item.buyer)
  sale.orders[item.id] = record
  sale.n_orders = sale.n_orders + 1
  sale.new[#sale.new + 1] = item.id
  sale.new[#sale.new + 1] = record
  round.new[#round.new + 1] = round.seq
  round.new[#round.new + 1] = item.id
  accepted[#accepted + 1] = { round = round, id = item.id, record = record }
  return 'accepted', record
end

local decisions = {}
for _, item in ipairs(items) do
  local word, facts = decide(item)
  decisions[#decisions + 1] = word
  decisions[#decisions + 1] = facts
end

-- Write --------------------------------------------------------------------------------------

if #accepted > 0 then
  local counters, orders, touched = {}, {}, 0
  for _, round in ipairs(rounds) do
    if not round.damage and #round.new > 0 then
      counters[#counters + 1] = pack_counters(round)
      round.index = touched
      touched = touched + 1
    end
  end
  for _, order in ipairs(accepted) do
    orders[#orders + 1] = string.char(order.round.index) .. order.id .. order.record
  end
  if not append(partition, table.concat(counters), table.concat(orders), '') then
    return { 'fenced', 'journal' }
  end
  for _, sale in pairs(sales) do
    if sale and #sale.new > 0 then
      redis.call('HSET', sale.orders_key, unpack(sale.new))
      redis.call('HSET', sale.key, 'n_orders', whole(sale.n_orders))
    end
  end
  for _, round in ipairs(rounds) do
    if not round.damage and #round.new > 0 then
      local buyers = {}
      for id in pairs(round.dirty) do
        local buyer = round.buyers[id]
        buyers[#buyers + 1] = id
        buyers[#buyers + 1] = struct.pack(BUYER, buyer.units, buyer.acceptances)
      end
      redis.call('HSET', round.buyers_key, unpack(buyers))
      redis.call('ZADD', round.board_key, unpack(round.new))
      write_round(partition, round)
    end
  end
end

local reply = { 'ok', whole(partition.now_ms), whole(partition.pseq), whole(#rounds) }
for _, round in ipairs(rounds) do
  reply[#reply + 1] = round.damage and '' or pack_standing(round, round.sale, partition.now_ms)
end
for _, part in ipairs(decisions) do
  reply[#reply + 1] = part
end
return reply
