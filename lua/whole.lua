-- whole: whether a round is there with all its keys, for the check that comes before a new epoch.
--
-- KEYS   1 meta, 2 journal, 3 round, 4 buyers, 5 board, 6 sale, 7 orders, 8 ops
-- Reply  { standing }; '' when the round is missing, not whole, or not as the journal says
-- Flags  no-writes

local round, sale = read_round(KEYS[3]), read_sale(KEYS[6])
if not round or not sale or not intact(round, KEYS[4], KEYS[5])
    or not has_orders(sale, KEYS[7])
    or redis.pcall('HLEN', KEYS[8]) ~= sale.n_ops then
  return { '' }
end
local _, said = journal_says(KEYS[3])
if said ~= '' and not string.find(said, pack_counters(round), 1, true) then
  return { '' }
end
return { pack_standing(round, sale, 0) }
