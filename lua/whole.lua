-- whole: whether a round is there with all its keys, for the check that comes before a new epoch.
--
-- KEYS   those of shared/change.lua
-- Reply  { standing }; '' when the round is missing, not whole, or not as the journal says
-- Flags  no-writes

local round, sale = read_round(KEYS[3]), read_sale(KEYS[9])
if not round or not sale or not intact(round, KEYS[4], KEYS[5], KEYS[6])
    or redis.pcall('ZCARD', KEYS[7]) ~= round.n_line or redis.pcall('HLEN', KEYS[8]) ~= round.n_line
    or not has_orders(sale, KEYS[10])
    or has(round.policy, LIMIT_OVER_SALE) and redis.pcall('HLEN', KEYS[11]) ~= sale.n_buyers
    or redis.pcall('HLEN', KEYS[12]) ~= sale.n_ops then
  return { '' }
end
local _, said = journal_says(KEYS[3])
if said ~= '' and not string.find(said, pack_counters(round), 1, true) then
  return { '' }
end
return { pack_standing(round, sale, 0) }
