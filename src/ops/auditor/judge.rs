//! The verdict: pure functions from what Redis and PostgreSQL say to checks with both numbers.
//!
//! PostgreSQL is always read before Redis. So what PostgreSQL has must be in Redis too, and two
//! numbers are compared as equals only when PostgreSQL counted them at the very entry that Redis
//! shows as the round's last; otherwise the writer is on its way, and the check is pending.

use serde::Serialize;
use utoipa::ToSchema;

use crate::{
    domain::{
        id::{Epoch, JournalId},
        limits::ALLOCATION_MAX,
        round::{Counters, Intent},
    },
    engine::{Remains, RoundAudit, RoundKeys},
    store::{
        audit::{RoundMoney, RoundSums, Stored},
        journal::Position,
    },
};

/// How long after its deadline a hold may still be there: sweeps come every second, and may have to
/// wait for the fence.
const HOLD_OVERDUE_MS: i64 = 5_000;

/// What came of a check, or of all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It holds.
    Pass,
    /// The writer has not stored enough yet to say so.
    Pending,
    /// It does not hold.
    Fail,
}

impl Status {
    /// The word that the API uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Pending => "pending",
            Self::Fail => "fail",
        }
    }

    fn of(holds: bool) -> Self {
        if holds { Self::Pass } else { Self::Fail }
    }
}

/// Everything that is checked of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckName {
    /// Redis: remaining + held + sold = allocation.
    Conservation,
    /// Redis: no counter is negative or above the allocation.
    Bounds,
    /// Redis: buyers, leaderboard and orders have as many entries as the round counts.
    RedisKeys,
    /// Redis: the counters are those of the round's last journal entry.
    RedisJournal,
    /// Once PostgreSQL has stored the round's last entry, its counters are those of Redis.
    PostgresRedis,
    /// No hold outlives its deadline.
    Holds,
    /// PostgreSQL has nothing that Redis does not have.
    PostgresNotAhead,
    /// PostgreSQL has no counters from behind the position.
    PostgresPosition,
    /// PostgreSQL: the counters are the sums of orders, events and dead letters.
    PostgresSums,
    /// PostgreSQL: the units of the orders that exist are within the allocation.
    NoOversell,
    /// PostgreSQL: each seq from 1 on is there exactly once.
    DenseSeq,
    /// PostgreSQL: no buyer has more than the limit.
    BuyerLimit,
    /// PostgreSQL refused nothing of the journal.
    DeadLetters,
    /// PostgreSQL: every order was accepted as the sale promises.
    Durability,
    /// PostgreSQL: an event explains the status of each order.
    Statuses,
    /// What was paid and is not given back is what the sold orders are worth, and each is paid.
    Payments,
    /// As many buyers wait in line in Redis as PostgreSQL says.
    Line,
    /// Redis has as many orders and operations of the sale as PostgreSQL.
    SaleCounts,
    /// Each order of PostgreSQL is in Redis, the same to the last field.
    Orders,
    /// The leaderboard is the confirmed orders of PostgreSQL, each at its place.
    Leaderboard,
    /// Each buyer has the same units and acceptances on both sides.
    Buyers,
    /// The orders are those that the round's certificate names.
    Certificate,
    /// The partition's journal has every entry behind the position, without a gap.
    Journal,
    /// Redis is in no later timeline than PostgreSQL.
    Epoch,
    /// Redis is set up so that it drops nothing.
    Settings,
}

impl CheckName {
    /// All of them.
    pub const ALL: [Self; 25] = [
        Self::Conservation,
        Self::Bounds,
        Self::RedisKeys,
        Self::RedisJournal,
        Self::PostgresRedis,
        Self::Holds,
        Self::PostgresNotAhead,
        Self::PostgresPosition,
        Self::PostgresSums,
        Self::NoOversell,
        Self::DenseSeq,
        Self::BuyerLimit,
        Self::DeadLetters,
        Self::Durability,
        Self::Statuses,
        Self::Payments,
        Self::Line,
        Self::SaleCounts,
        Self::Orders,
        Self::Leaderboard,
        Self::Buyers,
        Self::Certificate,
        Self::Journal,
        Self::Epoch,
        Self::Settings,
    ];

    /// Whether it is about a partition: all its rounds share what comes of it.
    pub fn is_of_partition(self) -> bool {
        matches!(self, Self::Journal | Self::Epoch | Self::Settings)
    }

    /// The word that the API and the metrics use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Conservation => "conservation",
            Self::Bounds => "bounds",
            Self::RedisKeys => "redis_keys",
            Self::RedisJournal => "redis_journal",
            Self::PostgresNotAhead => "postgres_not_ahead",
            Self::PostgresPosition => "postgres_position",
            Self::PostgresRedis => "postgres_redis",
            Self::PostgresSums => "postgres_sums",
            Self::NoOversell => "no_oversell",
            Self::DenseSeq => "dense_seq",
            Self::BuyerLimit => "buyer_limit",
            Self::DeadLetters => "dead_letters",
            Self::Durability => "durability",
            Self::Statuses => "statuses",
            Self::Payments => "payments",
            Self::Holds => "holds",
            Self::Line => "line",
            Self::SaleCounts => "sale_counts",
            Self::Orders => "orders",
            Self::Leaderboard => "leaderboard",
            Self::Buyers => "buyers",
            Self::Certificate => "certificate",
            Self::Journal => "journal",
            Self::Epoch => "epoch",
            Self::Settings => "settings",
        }
    }
}

/// One check with both numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Check {
    /// What is checked.
    pub name: CheckName,
    /// What came of it.
    pub status: Status,
    /// What should be.
    #[schema(example = "200 sold of 200, seq 200")]
    pub expected: String,
    /// What is.
    #[schema(example = "200 sold of 200, seq 200")]
    pub actual: String,
}

impl Check {
    fn new(
        name: CheckName,
        status: Status,
        expected: impl Into<String>,
        actual: impl Into<String>,
    ) -> Self {
        Self {
            name,
            status,
            expected: expected.into(),
            actual: actual.into(),
        }
    }

    /// Both must be the same.
    fn equal(name: CheckName, expected: String, actual: String) -> Self {
        Self::new(name, Status::of(expected == actual), expected, actual)
    }
}

/// The worst of `checks`.
pub fn verdict(checks: &[Check]) -> Status {
    checks
        .iter()
        .map(|check| check.status)
        .max()
        .unwrap_or(Status::Pending)
}

/// How many of something each side has, and the first that differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    /// In Redis, of those that PostgreSQL has.
    pub redis: u64,
    /// In PostgreSQL.
    pub postgres: u64,
    /// The first that is not the same.
    pub difference: Option<String>,
}

impl Pair {
    pub(super) fn differ(&mut self, what: impl FnOnce() -> String) {
        self.difference.get_or_insert_with(what);
    }
}

/// The orders and buyers of both sides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sides {
    /// Nobody looked, because the writer was on its way.
    Unread,
    /// Redis has the round, but what belongs to it cannot be read.
    Damaged(String),
    /// Only PostgreSQL has them.
    Archived,
    /// Both were read.
    Read {
        /// Orders, whatever their status.
        orders: Pair,
        /// Confirmed orders and their places.
        board: Pair,
        /// Buyers.
        buyers: Pair,
        /// Whether other rounds add to what is counted of buyers meanwhile.
        others_sell: bool,
        /// Something that Redis has less of than PostgreSQL.
        lacking: Option<String>,
    },
}

/// What a partition and PostgreSQL say of its journal.
#[derive(Clone, Debug)]
pub struct Journal {
    /// The position before Redis was asked.
    pub before: Position,
    /// The position after that.
    pub after: Position,
    /// The timeline in Redis.
    pub epoch: Epoch,
    /// The last entry by Redis' own count.
    pub pseq: u64,
    /// Entries in the journal; `None` when it is none.
    pub length: Option<u64>,
    /// The oldest entry.
    pub first: Option<JournalId>,
    /// The newest entry.
    pub last: Option<JournalId>,
    /// Why Redis may drop what it must keep.
    pub danger: Option<String>,
}

/// The checks of a partition, which all its rounds depend on.
pub fn judge_journal(journal: &Journal) -> Vec<Check> {
    let Journal {
        before,
        after,
        epoch,
        pseq,
        length,
        first,
        last,
        danger,
    } = journal;
    // Nothing is taken out of the journal that the position has not passed, so what is missing now
    // and not stored by now is lost.
    let stored = after.stored.pseq;
    let (status, actual) = match (length, first, last) {
        (None, ..) => (Status::Fail, "a key of another type".to_owned()),
        (Some(length), Some(first), Some(last)) => {
            let oldest = first.pseq.max(1);
            let gap = last.pseq + 1 - oldest.min(last.pseq + 1);
            if oldest > stored + 1 {
                let missing = format!("entries {} to {} are missing", stored + 1, oldest - 1);
                (Status::Fail, missing)
            } else if *length != gap || last.pseq != *pseq {
                let what = format!(
                    "{length} entries from {oldest} to {}, the last should be {pseq}",
                    last.pseq
                );
                (Status::Fail, what)
            } else {
                (Status::Pass, format!("entries {oldest} to {}", last.pseq))
            }
        }
        _ if *pseq > stored => {
            let missing = format!("entries {} to {pseq} are missing", stored + 1);
            (Status::Fail, missing)
        }
        _ => (Status::Pass, "no entry".to_owned()),
    };
    // A PostgreSQL that was set back learns a later timeline from the journal.
    let is_told = status == Status::Pass
        && last.is_some_and(|last| last.epoch == *epoch && last.pseq > stored);
    let timeline = match (*epoch <= after.epoch, after.stored.epoch <= after.epoch) {
        (true, true) => Status::Pass,
        (false, true) if is_told => Status::Pending,
        _ => Status::Fail,
    };
    vec![
        Check::new(
            CheckName::Journal,
            status,
            format!("every entry from {} to {pseq}", before.stored.pseq + 1),
            actual,
        ),
        Check::new(
            CheckName::Epoch,
            timeline,
            format!("at most {}", after.epoch.0),
            epoch.0.max(after.stored.epoch.0).to_string(),
        ),
        Check::new(
            CheckName::Settings,
            Status::of(danger.is_none()),
            "nothing is dropped",
            danger.as_deref().unwrap_or("nothing is dropped"),
        ),
    ]
}

/// Whether PostgreSQL has counted the round at the entry that Redis shows as its last.
pub fn level(redis: &RoundAudit, stored: &Stored) -> bool {
    matches!(&redis.keys, Ok(keys) if keys.entry == stored.counted_at)
}

/// What one script and one row tell: cheap enough for every second.
pub fn judge_counters(redis: &RoundAudit, stored: &Stored) -> Vec<Check> {
    let mut checks = Vec::with_capacity(CheckName::ALL.len());
    match &redis.keys {
        Ok(keys) => whole(keys, stored, &mut checks),
        Err(remains) => broken(remains, stored, &mut checks),
    }
    checks.push(not_ahead(redis, stored));
    checks.push(Check::new(
        CheckName::PostgresPosition,
        Status::of(stored.counted_at <= stored.position),
        format!("at most {}", stored.position),
        stored.counted_at.to_string(),
    ));
    checks
}

/// Everything.
pub fn judge(
    redis: &RoundAudit,
    sums: &RoundSums,
    sides: &Sides,
    orders: Option<&str>,
) -> Vec<Check> {
    let stored = sums.stored();
    let mut checks = judge_counters(redis, &stored);
    let counted = sums.counted();
    checks.push(Check::equal(
        CheckName::PostgresSums,
        counters(&counted),
        counters(&sums.counters),
    ));
    // From the rows alone, without the subtraction that hides what is too much.
    let dead_units = sums.dead.sold + sums.dead.held;
    let units = i128::from(sums.sold) + i128::from(sums.held) + i128::from(dead_units.max(0));
    checks.push(Check::new(
        CheckName::NoOversell,
        Status::of(units <= i128::from(counted.allocation)),
        format!("at most {}", counted.allocation),
        units.to_string(),
    ));
    checks.push(dense(sums));
    let above = match sums.buyers_above {
        0 => String::new(),
        1 => ", 1 buyer above".to_owned(),
        buyers => format!(", {buyers} buyers above"),
    };
    checks.push(Check::new(
        CheckName::BuyerLimit,
        Status::of(sums.buyers_above == 0 && sums.most_units <= sums.per_buyer_limit),
        format!("at most {} for each buyer", sums.per_buyer_limit),
        format!("at most {} for each buyer{above}", sums.most_units),
    ));
    let not_persisted = match sums.dead_letters {
        0 => String::new(),
        _ => format!(", {dead_units} units not persisted"),
    };
    checks.push(Check::new(
        CheckName::DeadLetters,
        Status::of(sums.dead_letters == 0),
        "0",
        format!("{}{not_persisted}", sums.dead_letters),
    ));
    let mode = sums.mode.as_str();
    checks.push(Check::new(
        CheckName::Durability,
        Status::of(sums.otherwise == 0),
        format!("all as `{mode}` says"),
        format!("{} otherwise", sums.otherwise),
    ));
    checks.push(Check::new(
        CheckName::Statuses,
        Status::of(sums.unexplained == 0),
        "every status has its event",
        match sums.unexplained {
            0 => "every status has its event".to_owned(),
            some => format!("{some} statuses and events do not fit"),
        },
    ));
    checks.push(payments(redis, sums));
    checks.push(line(redis, sums));
    checks.push(sale_counts(redis, sums));
    both(redis, &stored, sides, orders, &mut checks);
    let certified = sums.certified.as_deref();
    checks.push(match (certified, orders) {
        (None, _) => Check::new(CheckName::Certificate, Status::Pass, "none yet", "none yet"),
        (Some(certified), Some(orders)) => Check::equal(
            CheckName::Certificate,
            certified.to_owned(),
            orders.to_owned(),
        ),
        (Some(certified), None) => Check::new(
            CheckName::Certificate,
            Status::Pending,
            certified,
            "not read",
        ),
    });
    checks
}

/// The checks of a round whose keys are there.
fn whole(keys: &RoundKeys, stored: &Stored, checks: &mut Vec<Check>) {
    let now = keys.standing.counters;
    let sum = u128::from(now.remaining) + u128::from(now.held) + u128::from(now.sold);
    checks.push(Check::new(
        CheckName::Conservation,
        Status::of(sum == u128::from(now.allocation)),
        now.allocation.to_string(),
        format!(
            "{sum} = {} remaining + {} held + {} sold",
            now.remaining, now.held, now.sold
        ),
    ));
    let highest = now.remaining.max(now.held).max(now.sold);
    checks.push(Check::new(
        CheckName::Bounds,
        Status::of(highest <= now.allocation && now.allocation <= ALLOCATION_MAX),
        format!("0 to {}", now.allocation.min(ALLOCATION_MAX)),
        format!(
            "{} remaining, {} held, {} sold",
            now.remaining, now.held, now.sold
        ),
    ));
    let count = |buyers, board, holds, line, orders, operations| {
        format!(
            "{buyers} buyers, {board} on the leaderboard, {holds} held, {line} in line, {orders} \
             orders and {operations} operations of the sale"
        )
    };
    checks.push(Check::equal(
        CheckName::RedisKeys,
        count(
            keys.buyers.0,
            keys.board.0,
            keys.holds.0,
            keys.line.0,
            keys.orders.0,
            keys.operations.0,
        ),
        count(
            keys.buyers.1,
            keys.board.1,
            keys.holds.1,
            keys.line.1,
            keys.orders.1,
            keys.operations.1,
        ),
    ));
    checks.push(journal(keys, stored));
    checks.push(postgres_redis(keys, stored));
    // A hold that nobody swept keeps its units from everybody.
    let now_ms = keys.standing.now_ms;
    let overdue = keys.next_hold_ms.map_or(0, |until| now_ms - until);
    checks.push(Check::new(
        CheckName::Holds,
        Status::of(overdue <= HOLD_OVERDUE_MS),
        format!("none is over for more than {} s", HOLD_OVERDUE_MS / 1_000),
        match keys.next_hold_ms {
            None => "none is held".to_owned(),
            Some(_) if overdue <= HOLD_OVERDUE_MS => "none is over".to_owned(),
            Some(until) => format!("one has been over for {overdue} ms, since {until}"),
        },
    ));
}

/// The checks of a round whose keys are missing or not whole.
fn broken(remains: &Remains, stored: &Stored, checks: &mut Vec<Check>) {
    let nothing = *remains == Remains::default();
    if nothing && !stored.provisioned {
        // Redis does not have it yet, and nothing has been sold.
        for name in [
            CheckName::Conservation,
            CheckName::Bounds,
            CheckName::RedisKeys,
            CheckName::RedisJournal,
            CheckName::PostgresRedis,
            CheckName::Holds,
        ] {
            checks.push(Check::new(
                name,
                Status::Pending,
                "a round",
                "not provisioned yet",
            ));
        }
        return;
    }
    let Remains {
        allocation,
        remaining,
        held,
        sold,
        seq,
    } = *remains;
    let word = |number: Option<i64>| number.map_or("nothing".to_owned(), |n| n.to_string());
    let sum = [remaining, held, sold]
        .into_iter()
        .try_fold(0_i128, |sum, units| Some(sum + i128::from(units?)));
    checks.push(Check::new(
        CheckName::Conservation,
        Status::of(sum.is_some() && sum == allocation.map(i128::from)),
        word(allocation),
        format!(
            "{} = {} remaining + {} held + {} sold",
            sum.map_or("nothing".to_owned(), |sum| sum.to_string()),
            word(remaining),
            word(held),
            word(sold)
        ),
    ));
    let within = |units: Option<i64>| {
        units.is_some_and(|units| allocation.is_some_and(|all| (0..=all).contains(&units)))
    };
    checks.push(Check::new(
        CheckName::Bounds,
        Status::of(within(remaining) && within(held) && within(sold)),
        format!("0 to {}", word(allocation)),
        format!(
            "{} remaining, {} held, {} sold",
            word(remaining),
            word(held),
            word(sold)
        ),
    ));
    let what = if nothing { "missing" } else { "not whole" };
    checks.push(Check::new(
        CheckName::RedisKeys,
        Status::Fail,
        "a whole round",
        what,
    ));
    let shown = format!(
        "{what}: {} remaining, {} held, {} sold of {}, seq {}",
        word(remaining),
        word(held),
        word(sold),
        word(allocation),
        word(seq)
    );
    checks.push(Check::new(
        CheckName::RedisJournal,
        Status::Fail,
        "the round as its last entry left it",
        shown.clone(),
    ));
    checks.push(Check::new(
        CheckName::PostgresRedis,
        Status::Fail,
        shown,
        counters(&stored.counters),
    ));
    checks.push(Check::new(
        CheckName::Holds,
        Status::Pending,
        "a whole round",
        what,
    ));
}

/// Redis against its own journal.
fn journal(keys: &RoundKeys, stored: &Stored) -> Check {
    let now = at(keys.entry, &keys.standing.counters);
    match keys.journal {
        Some(said) => Check::equal(CheckName::RedisJournal, at(keys.entry, &said), now),
        // It was stored before it was trimmed.
        None if keys.entry == stored.counted_at => Check::equal(
            CheckName::RedisJournal,
            at(stored.counted_at, &stored.counters),
            now,
        ),
        None => Check::new(
            CheckName::RedisJournal,
            Status::Fail,
            format!(
                "entry {} in the journal or in PostgreSQL, which is at {}",
                keys.entry, stored.position
            ),
            "no such entry",
        ),
    }
}

/// Redis against PostgreSQL.
fn postgres_redis(keys: &RoundKeys, stored: &Stored) -> Check {
    let redis = at(keys.entry, &keys.standing.counters);
    let postgres = at(stored.counted_at, &stored.counters);
    let status = if keys.entry == stored.counted_at {
        Status::of(
            keys.standing.counters == stored.counters && keys.standing.intent == stored.intent,
        )
    } else {
        // Redis was read later: if PostgreSQL had the round's last entry by then, it passed it.
        Status::of(stored.position < keys.entry && stored.counted_at < keys.entry)
            .max(Status::Pending)
    };
    let word = |text: String, intent: Intent| format!("{text}, {}", intent.as_str());
    Check::new(
        CheckName::PostgresRedis,
        status,
        word(redis, keys.standing.intent),
        word(postgres, stored.intent),
    )
}

/// PostgreSQL was read first: whatever it has, Redis had before.
fn not_ahead(redis: &RoundAudit, stored: &Stored) -> Check {
    let place = |pseq: u64, seq: u64| format!("entry {pseq}, seq {seq}");
    let position = stored.position.pseq.max(stored.counted_at.pseq);
    let seq = match &redis.keys {
        Ok(keys) => Some(keys.standing.counters.seq),
        Err(remains) => remains.seq.and_then(|seq| u64::try_from(seq).ok()),
    };
    // A round that Redis never had has no events.
    let seq = seq.unwrap_or(0);
    Check::new(
        CheckName::PostgresNotAhead,
        Status::of(position <= redis.pseq && stored.counters.seq <= seq),
        format!("at most {}", place(redis.pseq, seq)),
        place(position, stored.counters.seq),
    )
}

fn payments(redis: &RoundAudit, sums: &RoundSums) -> Check {
    let RoundMoney {
        payments,
        unpaid,
        differing,
        stuck,
    } = sums.money;
    let mut wrong = Vec::new();
    for (count, what) in [
        (unpaid, "sold orders are not paid"),
        (differing, "keep another amount than was sold"),
        (stuck, "do not come to their end"),
    ] {
        if count > 0 {
            wrong.push(format!("{count} {what}"));
        }
    }
    let actual = if wrong.is_empty() {
        format!("{payments} payments, all as sold")
    } else {
        format!("{payments} payments, {}", wrong.join(", "))
    };
    let status = match unpaid + differing + stuck {
        0 => Status::Pass,
        // A payment is written down at once, its order when the writer has come so far.
        _ if level(redis, &sums.stored()) => Status::Fail,
        _ => Status::Pending,
    };
    let expected = format!("{payments} payments, all as sold");
    Check::new(CheckName::Payments, status, expected, actual)
}

fn dense(sums: &RoundSums) -> Check {
    let gap = sums
        .gap
        .map_or(String::new(), |seq| format!(", {seq} is missing"));
    let twice = match sums.duplicates {
        0 => String::new(),
        some => format!(", {some} more than once"),
    };
    Check::new(
        CheckName::DenseSeq,
        Status::of(sums.gap.is_none() && sums.duplicates == 0 && sums.events == sums.last_seq),
        format!("{} events up to seq {0}", sums.last_seq),
        format!(
            "{} events up to seq {}{gap}{twice}",
            sums.events, sums.last_seq
        ),
    )
}

/// Those who wait: equal at the round's last entry.
fn line(redis: &RoundAudit, sums: &RoundSums) -> Check {
    let stored = sums.waiting.to_string();
    match &redis.keys {
        Ok(keys) if keys.standing.intent == Intent::Archived => {
            Check::new(CheckName::Line, Status::Pass, "it has left", "it has left")
        }
        Ok(keys) if level(redis, &sums.stored()) => {
            Check::equal(CheckName::Line, keys.line.1.to_string(), stored)
        }
        Ok(_) | Err(_) => Check::new(CheckName::Line, Status::Pending, "at one entry", stored),
    }
}

/// Orders and operations of the sale: equal once nothing of the sale is on its way.
fn sale_counts(redis: &RoundAudit, sums: &RoundSums) -> Check {
    let name = CheckName::SaleCounts;
    let shown = |orders: u64, operations: i64| format!("{orders} orders, {operations} operations");
    let stored = shown(sums.sale_orders, sums.sale_operations.cast_signed());
    let Ok(keys) = &redis.keys else {
        return Check::new(name, Status::Pending, "a whole round", stored);
    };
    let (orders, operations) = (keys.standing.orders, keys.operations.0);
    // PostgreSQL was read first, so it has never more; the same only at the round's last entry.
    let never_more = sums.sale_orders <= orders && sums.sale_operations.cast_signed() <= operations;
    let at_rest = level(redis, &sums.stored()) && sums.others_final && sums.sale_letters == 0;
    let the_same = sums.sale_orders == orders && sums.sale_operations.cast_signed() == operations;
    let at_most = if at_rest { "" } else { "at most " };
    Check::new(
        name,
        Status::of(never_more && (the_same || !at_rest)),
        format!("{at_most}{}", shown(orders, operations)),
        stored,
    )
}

/// The orders, places and buyers of both sides.
fn both(
    redis: &RoundAudit,
    stored: &Stored,
    sides: &Sides,
    hash: Option<&str>,
    checks: &mut Vec<Check>,
) {
    use CheckName as N;
    let all = [
        (N::Orders, "orders"),
        (N::Leaderboard, "places"),
        (N::Buyers, "buyers"),
    ];
    match sides {
        Sides::Damaged(what) if stored.provisioned => {
            checks.extend(all.map(|(name, what_of)| {
                Check::new(name, Status::Fail, what_of, format!("damaged: {what}"))
            }));
        }
        Sides::Archived if level(redis, stored) => {
            checks.extend(all.map(|(name, what)| {
                let shown = format!("{what} in PostgreSQL alone");
                Check::new(name, Status::Pass, shown.clone(), shown)
            }));
        }
        Sides::Read {
            orders,
            board,
            buyers,
            others_sell,
            ..
        } if level(redis, stored) => {
            let (places, people) = match &redis.keys {
                Ok(keys) => (keys.board.1, keys.buyers.1),
                Err(_) => (-1, -1),
            };
            let most = match others_sell {
                true => buyers.postgres.cast_signed(),
                false => i64::MAX,
            };
            let hash = hash.and_then(|hash| hash.get(..8)).unwrap_or_default();
            let pairs = [
                (orders, orders.redis.cast_signed(), format!(", {hash}")),
                (board, places, String::new()),
                // Those who have come to other rounds since.
                (buyers, people.min(most), String::new()),
            ];
            checks.extend(all.into_iter().zip(pairs).map(
                |((name, what), (pair, in_redis, hash))| {
                    let difference = pair
                        .difference
                        .as_ref()
                        .map_or(String::new(), |text| format!("; {text}"));
                    let same = in_redis == pair.postgres.cast_signed();
                    Check::new(
                        name,
                        Status::of(same && difference.is_empty()),
                        format!("{in_redis} {what}{hash}"),
                        format!("{} {what}{hash}{difference}", pair.postgres),
                    )
                },
            ));
        }
        Sides::Unread | Sides::Damaged(_) | Sides::Archived | Sides::Read { .. } => {
            let entry = match &redis.keys {
                Ok(keys) => keys.entry.to_string(),
                Err(_) => "unknown".to_owned(),
            };
            checks.extend(all.map(|(name, _)| {
                Check::new(
                    name,
                    Status::Pending,
                    format!("stored up to entry {entry}"),
                    format!("stored up to entry {}", stored.counted_at),
                )
            }));
        }
    }
}

fn counters(counters: &Counters) -> String {
    let Counters {
        allocation,
        remaining,
        held,
        sold,
        seq,
    } = counters;
    format!("{remaining} remaining, {held} held, {sold} sold of {allocation}, seq {seq}")
}

fn at(entry: JournalId, now: &Counters) -> String {
    format!("{} at entry {entry}", counters(now))
}

#[cfg(test)]
mod tests;
