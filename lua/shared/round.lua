-- A round: read with all the checks that a lost or foreign key must not pass.

local INTENT = { live = 0, paused = 1, closed = 2, settled = 3, archived = 4 }
-- Intents that are the end, whatever the window says.
local OVER = { closed = true, settled = true, archived = true }
local STATE = { scheduled = 0, open = 1, paused = 2, closed = 3 }

-- sale number, round, allocation, remaining, held, sold, seq
local COUNTERS = '>I4I4I6I6I6I6I6'
-- COUNTERS, then intent, state, opens_ms, closes_ms (0: none), limit per order, orders of the
-- sale, archived rounds of the sale, buyers in the line
local STANDING = '>BBI6I6I4I6I4I4'
-- units that the buyer has, acceptances that the buyer ever got
local BUYER = '>I4I4'

-- Acceptances that one buyer gets on top of the limit, so that buying and cancelling ends.
local SPARE_ACCEPTANCES = 8

-- Bits of a round's policy: its limit per buyer counts over all rounds of the sale; it closes once
-- everything is sold; buyers may wait in line for units that come back.
local LIMIT_OVER_SALE, ENDS_SOLD_OUT, HAS_LINE = 1, 2, 4

local function has(policy, bit)
  return math.floor(policy / bit) % 2 == 1
end

-- Reads the round's own hash. Returns the round, or nil when it is missing, not a round, or was
-- condemned (condemn.lua).
local function read_round(key)
  local f = redis.pcall('HMGET', key,
    'sale', 'round', 'intent', 'opens_ms', 'closes_ms', 'buyer_limit', 'order_limit', 'price',
    'allocation', 'remaining', 'held', 'sold', 'seq', 'n_buyers', 'n_board', 'grace_ms', 'condemned',
    'hold_ms', 'policy', 'n_holds', 'n_line')
  if f.err or f[17] then
    return nil
  end
  local round = {
    key = key,
    sale_number = tonumber(f[1]), number = tonumber(f[2]),
    opens_ms = tonumber(f[4]), closes_ms = tonumber(f[5]),
    buyer_limit = tonumber(f[6]), order_limit = tonumber(f[7]),
    allocation = tonumber(f[9]), remaining = tonumber(f[10]),
    held = tonumber(f[11]), sold = tonumber(f[12]), seq = tonumber(f[13]),
    n_buyers = tonumber(f[14]), n_board = tonumber(f[15]),
  }
  -- Thirteen numbers and the key: one that is missing or no number is not in the table.
  local fields = 0
  for _ in pairs(round) do
    fields = fields + 1
  end
  round.intent, round.price = f[3], f[8]
  -- Not in rounds from before there were holds.
  round.hold_ms, round.policy = tonumber(f[18] or '0'), tonumber(f[19] or '0')
  round.n_holds, round.n_line = tonumber(f[20] or '0'), tonumber(f[21] or '0')
  -- Only a round whose acceptances were lost has one.
  local grace_ms = f[16] and tonumber(f[16]) or 0
  if fields ~= 14 or not (round.hold_ms and round.policy and round.n_holds and round.n_line)
      or not INTENT[round.intent] or not round.price or #round.price ~= 11 then
    return nil
  end
  -- Conservation: every unit is in exactly one place.
  if round.remaining + round.held + round.sold ~= round.allocation
      or round.remaining < 0 or round.held < 0 or round.sold < 0 then
    return nil
  end
  round.grace_ms = grace_ms
  return round
end

-- Reads the sale's hash, or nil. n_orders never falls; n_archived of them have left Redis, with the
-- rounds that archived_rounds counts. n_buyers are those that its limit over all rounds knows.
local function read_sale(key)
  local f = redis.pcall('HMGET', key, 'n_orders', 'n_ops', 'n_archived', 'archived_rounds', 'n_buyers')
  if f.err or not f[1] or not f[2] then
    return nil
  end
  return { key = key, n_orders = tonumber(f[1]), n_ops = tonumber(f[2]),
    n_archived = tonumber(f[3] or '0'), archived_rounds = tonumber(f[4] or '0'),
    n_buyers = tonumber(f[5] or '0') }
end

-- Whether the sale's orders are all there.
local function has_orders(sale, orders_key)
  return redis.pcall('HLEN', orders_key) == sale.n_orders - sale.n_archived
end

-- Whether the keys beside the round's hash are as the hashes say. Lost keys are not empty keys:
-- without these a buyer could buy twice. A key of another type gives an error here, not a count.
local function intact(round, buyers_key, board_key, holds_key)
  return redis.pcall('HLEN', buyers_key) == round.n_buyers
    and redis.pcall('ZCARD', board_key) == round.n_board
    and (round.hold_ms == 0 or redis.pcall('ZCARD', holds_key) == round.n_holds)
end

-- What the round is at this instant. Stored is only what the operator wants, and until when the
-- receipts of lost acceptances come before the public.
local function state_of(round, now_ms)
  if OVER[round.intent] or (round.closes_ms > 0 and now_ms >= round.closes_ms) then
    return 'closed'
  elseif now_ms < round.opens_ms then
    return 'scheduled'
  elseif round.intent == 'paused' or now_ms < round.grace_ms then
    return 'paused'
  end
  return 'open'
end

local function pack_counters(round)
  return struct.pack(COUNTERS, round.sale_number, round.number, round.allocation,
    round.remaining, round.held, round.sold, round.seq)
end

local function pack_standing(round, sale, now_ms)
  return pack_counters(round) .. struct.pack(STANDING, INTENT[round.intent],
    STATE[state_of(round, now_ms)], round.opens_ms, round.closes_ms, round.order_limit,
    sale.n_orders, sale.archived_rounds, round.n_line)
end
