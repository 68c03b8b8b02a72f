-- Writing: the journal entry first, then the partition, then the round.
--
-- KEYS[2]  {p}:journal  stream  ids <epoch>-<pseq>

local VERSION = 2
local STATUS = { held = 0, confirmed = 1, expired = 2, cancelled = 3, refunded = 4, withdrawn = 5 }
-- Of entries with an event or a hold: a build without them must stop, not misread.
local VERSION_LIFE = 4
local EVENT = { epoch = 0, provision = 1, cancel = 2, restock = 3, pause = 4, resume = 5, close = 6,
  settle = 7, archive = 8, confirm = 9, expire = 10, extend = 11, withdraw = 12, refund = 13,
  ['return'] = 14, reduce = 15, amend = 16, join = 17, leave = 18 }
-- Added to the kind of an event whose units were held before it.
local FROM_HELD = 128

-- An order: version, status, status at acceptance, durability, key of its receipt (0: none), round,
-- epoch, seq, pseq, quantity, unit price (11 raw bytes: amount and currency), accepted_ms,
-- fingerprint, buyer.
local RECORD = '>BBBBBI4I4I6I6I4c11I6c8c16'
-- The same in parts: up to the seq, and from the seq to the fingerprint.
local RECORD_HEAD, RECORD_MIDDLE = '>BBBBBI4I4', '>I6I4c11I6'
-- Version 1 had no key. Its records stay as they are.
local RECORD_1 = '>BBBBI4I4I6I6I4c11I6c8c16'
-- An order that was held, or partly given back, is of version 3, with this before the fingerprint:
-- how long its hold was at acceptance, by how much it was extended (both ms), units that are back on
-- sale, units that were refunded and stay sold.
local RECORD_3 = '>BBBBBI4I4I6I6I4c11I6I4I4I4I4c8c16'
local RECORD_LIFE = '>I4I4I4I4'
local VERSION_RECORD_LIFE = 3
-- Another event: index of its round in the entry, seq, kind, order, units (of extend: milliseconds),
-- actor, operation, fingerprint of what was asked. What there is not is zeros.
local EVENT_FORMAT = '>BI6Bc16I6c16c16c8'
local NO_ID, NO_FINGERPRINT = string.rep('\0', 16), string.rep('\0', 8)

-- The number of the round that an order is of.
local function round_of(record)
  return (struct.unpack('>I4', record, string.byte(record) == 1 and 5 or 6))
end

local function pack_event(round_index, seq, kind, order, units, actor, operation, fingerprint,
    from_held)
  return struct.pack(EVENT_FORMAT, round_index, seq, EVENT[kind] + (from_held and FROM_HELD or 0),
    order or NO_ID, units, actor or NO_ID, operation or NO_ID, fingerprint or NO_FINGERPRINT)
end

-- Whether a round that ends with its last unit has sold it.
local function ends_now(round)
  return has(round.policy, ENDS_SOLD_OUT) and round.remaining == 0 and round.held == 0
    and not OVER[round.intent]
end

-- Closes a round for good, because everything is sold. Returns the event.
local function close_by_itself(round, index)
  round.intent, round.seq = 'closed', round.seq + 1
  return pack_event(index, round.seq, 'close', nil, 0)
end

-- Appends one entry. The first write of a script: a missing journal, a key of another type or a
-- regression writes nothing, and the caller answers `fenced`.
--   rounds  packed COUNTERS of every round it touched, after it
--   orders  for each acceptance: index of its round (one byte), raw id, RECORD
--   events  packed EVENT_FORMAT
--   life    whether one of the orders is held
--   terms   packed TERMS for each event that amends
local function append(partition, rounds, orders, events, life, terms)
  local pseq = partition.pseq + 1
  local id = redis.pcall('XADD', KEYS[2], 'NOMKSTREAM', whole(partition.epoch) .. '-' .. whole(pseq),
    'v', (life or events ~= '') and VERSION_LIFE or VERSION, 't', whole(partition.now_ms), 'r', rounds, 'o', orders, 'e', events,
    unpack(terms and { 'a', terms } or {}))
  if not id or type(id) == 'table' then
    return false
  end
  redis.call('HSET', KEYS[1], 'pseq', whole(pseq), 'last_ms', whole(partition.now_ms))
  partition.pseq = pseq
  return true
end

-- Writes the round's counters, and the entry that brought them.
local function write_round(partition, round)
  redis.call('HSET', round.key, 'intent', round.intent,
    'allocation', whole(round.allocation), 'remaining', whole(round.remaining),
    'held', whole(round.held), 'sold', whole(round.sold), 'seq', whole(round.seq),
    'n_buyers', whole(round.n_buyers), 'n_board', whole(round.n_board),
    'entry', whole(partition.epoch) .. '-' .. whole(partition.pseq))
  if round.hold_ms > 0 then
    redis.call('HSET', round.key, 'n_holds', whole(round.n_holds), 'n_line', whole(round.n_line))
  end
end

-- What the journal says of a round: the id of the last entry that touched it, and the counters of
-- all rounds in that entry; '' when the journal has it no more.
local function journal_says(round_key)
  local id = redis.call('HGET', round_key, 'entry') or ''
  local found = redis.pcall('XRANGE', KEYS[2], id, id)
  if found.err or not found[1] then
    return id, ''
  end
  local fields = found[1][2]
  for i = 1, #fields, 2 do
    if fields[i] == 'r' then
      return id, fields[i + 1]
    end
  end
  return id, ''
end
