//! Every bound of the contract, each with the reason for its value.

/// Units that one round may hand out over its whole life, restocks included.
///
/// The cost of a purchase does not depend on it; the memory of a round does.
pub const ALLOCATION_MAX: u64 = 10_000_000;

/// Units that one buyer may hold in one round.
pub const BUYER_LIMIT_MAX: u64 = 1_000_000;

/// Acceptances that one buyer gets in one round on top of the limit.
///
/// Each acceptance leaves an order behind, a cancelled one too. Without a cap, buying and
/// cancelling in a loop would grow the state of a round without bound.
pub const SPARE_ACCEPTANCES: u64 = 8;

/// How long before they open rounds are in Redis, in milliseconds; the next one always is. Long enough
/// to mend what keeps one from getting there, short enough that a change of the sale still reaches
/// most of them.
pub const ROUNDS_AHEAD_MS: i64 = 10 * 60 * 1_000;

/// Rounds of a sale that are in Redis before they open: enough for windows of a second while a node
/// restarts.
pub const ROUNDS_AHEAD_MAX: usize = 8;

/// The longest window of a recurring schedule, in seconds: 31 days. What is open longer than that
/// does not recur.
pub const SCHEDULE_SECONDS_MAX: u64 = 31 * 24 * 60 * 60;

/// Windows that a schedule may list: about three years of daily ones, in one request.
pub const SCHEDULE_WINDOWS_MAX: usize = 1_000;
/// The shortest hold, in milliseconds: holds end with the first sweep after their deadline.
pub const HOLD_MS_MIN: u64 = 1_000;

/// The longest hold, in milliseconds: a day.
pub const HOLD_MS_MAX: u64 = 86_400_000;

/// Buyers that may wait in line for units of one round. Each is an entry of the journal, and about
/// 200 bytes of Redis until the round leaves it.
pub const LINE_MAX: u64 = 100_000;

/// Buyers in line that are offered units in one call, beside whatever else it does.
pub const OFFERS_MAX: u64 = 16;

/// Holds that one sweep ends: a good millisecond of Redis, ten microseconds each.
pub const SWEEP_HOLDS_MAX: u64 = 128;

/// Buyers in line that one sweep offers units to.
pub const SWEEP_OFFERS_MAX: u64 = 32;

/// The greatest age that a sale may ask of its buyers' accounts, in seconds: a year.
pub const ACCOUNT_AGE_SECONDS_MAX: u64 = 365 * 24 * 60 * 60;

/// The hardest proof of work that a sale may ask for, in bits: about 17 million hashes. Compiled code
/// finds one within seconds; beyond that not even it would within the life of a challenge on a phone.
pub const PROOF_BITS_MAX: u8 = 24;

/// How long a challenge may be solved and used, in milliseconds: two minutes. Long enough for a slow
/// phone, too short to collect solutions before a drop.
pub const PROOF_LIFE_MS: i64 = 120_000;

/// The longest `Idempotency-Key`, in characters.
pub const IDEMPOTENCY_KEY_MAX: usize = 255;

/// The largest amount of money, in minor units: far above any price, far below 2^53.
pub const AMOUNT_MAX: i64 = 100_000_000_000_000;

/// Purchases that travel in one script call.
///
/// At 128 a call takes about a millisecond of Redis; more would make everybody else wait longer
/// and save little.
pub const CALL_ITEMS_MAX: usize = 128;

/// Rounds that one script call may touch: each costs a fixed number of reads.
pub const CALL_ROUNDS_MAX: usize = 16;

/// Bytes of arguments in one script call.
pub const CALL_ARGUMENT_BYTES_MAX: usize = 64 * 1024;

/// Orders that leave Redis in one call: about a millisecond of it.
pub const ARCHIVE_ORDERS_MAX: usize = 500;

/// A script call that Redis has not begun this long after it was planned must not run any more.
pub const CALL_DEADLINE_MS: i64 = 2_000;

/// How long a purchase of a sale with `replicated` waits for its replicas, in milliseconds: a healthy
/// one needs one or two, and behind one that hangs the others queue up.
pub const REPLICAS_WAIT_MS: u64 = 1_000;

/// How long an acceptance of a sale with `committed` waits for PostgreSQL, in milliseconds: as long
/// as a writer that has stored nothing may be before purchases are refused, and a little.
pub const COMMIT_WAIT_MS: u64 = 2_500;

/// How long PostgreSQL may be behind without moving before purchases of sales with `committed` are
/// refused, in milliseconds. Shorter than anybody waits, so that few are left in doubt.
pub const WRITER_STALL_MS: u64 = 2_000;

/// A difference between Redis' clock and a node's estimate of it that is a fault, not a delay.
pub const CLOCK_JUMP_MS: i64 = 5_000;

/// How long a node may believe what a reply said about a round.
pub const MEMORY_MS: i64 = 100;

// Whoever was let in just before the stall was seen still gets to hear of the next commit.
const _: () = assert!(WRITER_STALL_MS < COMMIT_WAIT_MS);
// An answer from memory must be gone long before a deadline could matter.
const _: () = assert!(MEMORY_MS * 10 <= CALL_DEADLINE_MS);
// A late call must be refused as late, before its lateness could look like a jump of the clock.
const _: () = assert!(CALL_DEADLINE_MS < CLOCK_JUMP_MS);
// Lua's numbers are exact to 2^53; sums of these stay far below.
const _: () = assert!(AMOUNT_MAX < 1 << 53);
const _: () = assert!(ALLOCATION_MAX * BUYER_LIMIT_MAX < 1 << 53);
