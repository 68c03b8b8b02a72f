-- What a script changes of one round: collected while it decides, then written, journal entry first.
--
-- KEYS   1 meta, 2 journal, 3 round, 4 buyers, 5 board, 6 holds, 7 line, 8 wishes, 9 sale, 10 orders,
--        11 buyers of the sale, 12 ops

-- what an operation asked for, and the seq it took
local OPERATION = '>c8I6'
-- what a buyer in the line waits for: id that the order will have, its fingerprint, units at most
local WISH = '>c16c8I4'
-- The durability of a sale of which nothing may be accepted at the moment.
local NONE = 255

-- Reads the round with everything beside it. Returns the change, or nil and the reply.
local function open_change(caller)
  local partition, refusal = enter(caller)
  if not partition then
    return nil, refusal
  end
  local round, sale = read_round(KEYS[3]), read_sale(KEYS[9])
  if not round or not sale or not intact(round, KEYS[4], KEYS[5], KEYS[6])
      or not has_orders(sale, KEYS[10]) or redis.pcall('HLEN', KEYS[12]) ~= sale.n_ops
      or redis.pcall('ZCARD', KEYS[7]) ~= round.n_line
      or redis.pcall('HLEN', KEYS[8]) ~= round.n_line then
    return nil, { 'damaged', 'round' }
  end
  local over_sale = has(round.policy, LIMIT_OVER_SALE)
  if over_sale and redis.pcall('HLEN', KEYS[11]) ~= sale.n_buyers then
    return nil, { 'damaged', 'buyers of the sale' }
  end
  return {
    partition = partition, round = round, sale = sale,
    members_key = over_sale and KEYS[11] or KEYS[4], over_sale = over_sale,
    events = {}, accepted = {}, terms = nil, operation = nil,
    -- Arguments of the commands that write it.
    records = {}, buyers = {}, on_board = {}, off_board = {}, on_hold = {}, off_hold = {},
    in_line = {}, wishes = {}, off_line = {},
  }
end

-- The reply that tells where the round is now.
local function answer(change, ...)
  return { 'ok', whole(change.partition.now_ms), whole(change.partition.pseq),
    pack_standing(change.round, change.sale, change.partition.now_ms), ... }
end

-- Adds the event that comes next in the round.
local function note(change, kind, id, units, actor, operation, fingerprint, from_held)
  local round = change.round
  round.seq = round.seq + 1
  change.events[#change.events + 1] =
    pack_event(0, round.seq, kind, id, units, actor, operation, fingerprint, from_held)
end

local function parse_order(id, record)
  local version, f = string.byte(record), nil
  if version == 1 then
    f = { struct.unpack(RECORD_1, record) }
    table.insert(f, 5, 0)
  elseif version == VERSION_RECORD_LIFE then
    f = { struct.unpack(RECORD_3, record) }
  else
    f = { struct.unpack(RECORD, record) }
  end
  local life = version == VERSION_RECORD_LIFE
  local order = {
    id = id, record = record, version = version,
    status = f[2], accepted_as = f[3], durability = f[4], key = f[5], round = f[6], epoch = f[7],
    seq = f[8], pseq = f[9], quantity = f[10], price = f[11], accepted_ms = f[12],
    hold_ms = life and f[13] or 0, extended_ms = life and f[14] or 0,
    returned = life and f[15] or 0, refunded = life and f[16] or 0,
    fingerprint = life and f[17] or f[13], buyer = life and f[18] or f[14],
  }
  if not life and order.status == STATUS.cancelled then
    order.returned = order.quantity
  end
  order.until_ms = order.accepted_ms + order.hold_ms + order.extended_ms
  return order
end

-- Packs the order as it is now. A plain one that went back as a whole keeps its form.
local function set_order(change, order)
  if order.version ~= VERSION_RECORD_LIFE and order.refunded == 0
      and order.returned == (order.status == STATUS.cancelled and order.quantity or 0)
      and order.status ~= STATUS.withdrawn then
    order.record = string.sub(order.record, 1, 1) .. string.char(order.status)
      .. string.sub(order.record, 3)
  else
    order.record = struct.pack(RECORD_3, VERSION_RECORD_LIFE, order.status, order.accepted_as,
      order.durability, order.key, order.round, order.epoch, order.seq, order.pseq, order.quantity,
      order.price, order.accepted_ms, order.hold_ms, order.extended_ms, order.returned,
      order.refunded, order.fingerprint, order.buyer)
  end
  change.records[#change.records + 1] = order.id
  change.records[#change.records + 1] = order.record
end

-- The order with this id, or nil. `damage` says that the round does not fit it.
local function read_order(change, id)
  local record = redis.call('HGET', KEYS[10], id)
  if not record then
    return nil
  end
  local order = parse_order(id, record)
  local place = redis.call('ZSCORE', KEYS[5], id)
  local deadline = change.round.hold_ms > 0 and redis.call('ZSCORE', KEYS[6], id) or false
  if order.round ~= change.round.number
      or place ~= (order.status == STATUS.confirmed and whole(order.seq) or false)
      or deadline ~= (order.status == STATUS.held and whole(order.until_ms) or false) then
    return order, 'order'
  end
  return order
end

-- The order with this id, if it waits for its payment and still has time; otherwise nil and the
-- reply that says what it is.
local function held_order(change, id)
  local order, damage = read_order(change, id)
  if not order then
    return nil, answer(change, 'unknown', '')
  elseif order.status ~= STATUS.held then
    return nil, answer(change, 'already', order.record)
  elseif damage then
    return nil, { 'damaged', damage }
  elseif change.partition.now_ms >= order.until_ms then
    return nil, answer(change, 'late', order.record)
  end
  return order
end

-- What the limit knows of a buyer, read once; nil when it knows nothing.
local function member(change, buyer)
  local known = change.buyers[buyer]
  if known == nil then
    local packed = redis.call('HGET', change.members_key, buyer)
    known = false
    if packed then
      local units, acceptances = struct.unpack(BUYER, packed)
      known = { units = units, acceptances = acceptances, changed = false }
    end
    change.buyers[buyer] = known
  end
  return known or nil
end

-- Units of an order are for sale again. Returns whether the round and the buyer had them.
local function give_back(change, order, units)
  local round, who = change.round, member(change, order.buyer)
  local place = order.status == STATUS.held and 'held' or 'sold'
  if not who or who.units < units or round[place] < units then
    return false
  end
  round[place] = round[place] - units
  round.remaining = round.remaining + units
  who.units, who.changed = who.units - units, true
  order.returned = order.returned + units
  return true
end

-- Gives an order a status that ends what it was: held or confirmed.
local function leave_status(change, order, word)
  if order.status == STATUS.held then
    change.off_hold[#change.off_hold + 1] = order.id
    change.round.n_holds = change.round.n_holds - 1
  elseif order.status == STATUS.confirmed then
    change.off_board[#change.off_board + 1] = order.id
    change.round.n_board = change.round.n_board - 1
  end
  order.status = STATUS[word]
  if word == 'confirmed' then
    change.on_board[#change.on_board + 1] = whole(order.seq)
    change.on_board[#change.on_board + 1] = order.id
    change.round.n_board = change.round.n_board + 1
  end
end

-- Units that are back go to whoever waits longest, as a hold, before the public sees them: at most
-- `most` buyers at once; the public gets nothing while anybody waits. `durability` is what the
-- acceptances survive.
local function offer(change, most, durability)
  local round, partition = change.round, change.partition
  if most == 0 or durability == NONE or round.n_line == 0 or round.remaining == 0
      or state_of(round, partition.now_ms) ~= 'open' then
    return 0
  end
  local offered = 0
  local buyers = redis.call('ZRANGE', KEYS[7], 0, most - 1)
  local wishes = redis.call('HMGET', KEYS[8], unpack(buyers))
  for i, buyer in ipairs(buyers) do
    if round.remaining == 0 then
      break
    end
    local id, fingerprint, wanted = struct.unpack(WISH, wishes[i])
    local who = member(change, buyer) or { units = 0, acceptances = 0, is_new = true }
    local units = math.min(wanted, round.remaining, round.buyer_limit - who.units)
    change.off_line[#change.off_line + 1] = buyer
    round.n_line = round.n_line - 1
    if units <= 0 or who.acceptances >= round.buyer_limit + SPARE_ACCEPTANCES then
      -- Bought as much as may be had, and waits for nothing any more.
      note(change, 'leave', id, 0, buyer)
    else
      note(change, 'leave', id, units, buyer)
      if who.is_new then
        change.buyers[buyer] = who
        local owner = change.over_sale and change.sale or round
        owner.n_buyers = owner.n_buyers + 1
      end
      who.units, who.acceptances, who.changed = who.units + units, who.acceptances + 1, true
      round.seq = round.seq + 1
      round.remaining, round.held = round.remaining - units, round.held + units
      round.n_holds = round.n_holds + 1
      local order = {
        id = id, version = VERSION_RECORD_LIFE, status = STATUS.held, accepted_as = STATUS.held,
        -- Nobody gets a 201 for it, so it has no receipt.
        durability = durability, key = 0, round = round.number,
        epoch = partition.epoch, seq = round.seq, pseq = partition.pseq + 1, quantity = units,
        price = round.price, accepted_ms = partition.now_ms, hold_ms = round.hold_ms,
        extended_ms = 0, returned = 0, refunded = 0, fingerprint = fingerprint, buyer = buyer,
      }
      set_order(change, order)
      change.accepted[#change.accepted + 1] = '\0' .. id .. order.record
      change.on_hold[#change.on_hold + 1] = whole(partition.now_ms + round.hold_ms)
      change.on_hold[#change.on_hold + 1] = id
      change.sale.n_orders = change.sale.n_orders + 1
      offered = offered + 1
    end
  end
  return offered
end

local function call_with(command, key, arguments)
  if #arguments > 0 then
    redis.call(command, key, unpack(arguments))
  end
end

-- Writes what was collected. Returns nil, or the reply when the journal does not take it: then
-- nothing is written.
local function commit(change)
  local round, sale, partition = change.round, change.sale, change.partition
  if ends_now(round) then
    change.events[#change.events + 1] = close_by_itself(round, 0)
  end
  if #change.events == 0 then
    return nil
  end
  if not append(partition, pack_counters(round), table.concat(change.accepted),
      table.concat(change.events), false, change.terms) then
    return { 'fenced', 'journal' }
  end
  call_with('HSET', KEYS[10], change.records)
  local members = {}
  for buyer, who in pairs(change.buyers) do
    if who and who.changed then
      members[#members + 1] = buyer
      members[#members + 1] = struct.pack(BUYER, who.units, who.acceptances)
    end
  end
  call_with('HSET', change.members_key, members)
  call_with('ZREM', KEYS[5], change.off_board)
  call_with('ZADD', KEYS[5], change.on_board)
  call_with('ZREM', KEYS[6], change.off_hold)
  call_with('ZADD', KEYS[6], change.on_hold)
  call_with('ZREM', KEYS[7], change.off_line)
  call_with('HDEL', KEYS[8], change.off_line)
  call_with('ZADD', KEYS[7], change.in_line)
  call_with('HSET', KEYS[8], change.wishes)
  if change.operation then
    redis.call('HSET', KEYS[12], unpack(change.operation))
    sale.n_ops = sale.n_ops + 1
  end
  redis.call('HSET', sale.key, 'n_orders', whole(sale.n_orders), 'n_ops', whole(sale.n_ops),
    'n_buyers', whole(sale.n_buyers))
  write_round(partition, round)
  return nil
end
