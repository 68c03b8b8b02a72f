-- Writing: the journal entry first, then the partition, then the round.
--
-- KEYS[2]  {p}:journal  stream  ids <epoch>-<pseq>

local VERSION = 2
local STATUS = { held = 0, confirmed = 1, expired = 2, cancelled = 3, refunded = 4 }
-- Of entries with an event of the round's end: a build without them must stop, not misread.
local VERSION_END = 3
local EVENT = { epoch = 0, provision = 1, cancel = 2, restock = 3, pause = 4, resume = 5, close = 6,
  settle = 7, archive = 8 }

-- An order: version, status, status at acceptance, durability, key of its receipt (0: none), round,
-- epoch, seq, pseq, quantity, unit price (11 raw bytes: amount and currency), accepted_ms,
-- fingerprint, buyer.
local RECORD = '>BBBBBI4I4I6I6I4c11I6c8c16'
-- The same in parts: up to the seq, and from the seq to the fingerprint.
local RECORD_HEAD, RECORD_MIDDLE = '>BBBBBI4I4', '>I6I4c11I6'
-- Version 1 had no key. Its records stay as they are.
local RECORD_1 = '>BBBBI4I4I6I6I4c11I6c8c16'
-- Another event: index of its round in the entry, seq, kind, order, units, actor, operation.
-- An id that there is not is sixteen zeros.
local EVENT_FORMAT = '>BI6Bc16I6c16c16'
local NO_ID = string.rep('\0', 16)

-- What giving an order back needs of its record: status, seq, quantity, buyer.
local function unpack_record(record)
  local f
  if string.byte(record) == 1 then
    f = { struct.unpack(RECORD_1, record) }
    table.insert(f, 5, 0)
  else
    f = { struct.unpack(RECORD, record) }
  end
  return f[2], f[8], f[10], f[14]
end

-- The number of the round that an order is of.
local function round_of(record)
  return (struct.unpack('>I4', record, string.byte(record) == 1 and 5 or 6))
end

local function with_status(record, status)
  return string.sub(record, 1, 1) .. string.char(STATUS[status]) .. string.sub(record, 3)
end

local function pack_event(round_index, seq, kind, order, units, actor, operation)
  return struct.pack(EVENT_FORMAT, round_index, seq, EVENT[kind], order or NO_ID, units,
    actor or NO_ID, operation or NO_ID)
end

-- Appends one entry. The first write of a script: a missing journal, a key of another type or a
-- regression writes nothing, and the caller answers `fenced`.
--   rounds  packed COUNTERS of every round it touched, after it
--   orders  for each acceptance: index of its round (one byte), raw id, RECORD
--   events  packed EVENT_FORMAT
--   version of the entry; VERSION if absent
local function append(partition, rounds, orders, events, version)
  local pseq = partition.pseq + 1
  local id = redis.pcall('XADD', KEYS[2], 'NOMKSTREAM', whole(partition.epoch) .. '-' .. whole(pseq),
    'v', version or VERSION, 't', whole(partition.now_ms), 'r', rounds, 'o', orders, 'e', events)
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
