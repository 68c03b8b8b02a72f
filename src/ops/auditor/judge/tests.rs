use super::*;
use crate::{
    domain::{
        id::{Epoch, JournalId, RoundId, SaleNumber},
        journal::Delta,
        order::Mode,
        round::{LimitScope, State, Window},
    },
    engine::Standing,
};

fn entry(pseq: u64) -> JournalId {
    JournalId {
        epoch: Epoch(2),
        pseq,
    }
}

/// What was read of a round: 60 units in 50 orders, ten of them given back, one restock.
#[derive(Clone)]
struct Evidence {
    redis: RoundAudit,
    sums: RoundSums,
    sides: Sides,
    orders: Option<&'static str>,
}

const HASH: &str = "00c0ffee00c0ffee";

impl Evidence {
    fn sound() -> Self {
        let counters = Counters {
            allocation: 110,
            remaining: 60,
            held: 0,
            sold: 50,
            seq: 61,
        };
        let pair = |both| Pair {
            redis: both,
            postgres: both,
            difference: None,
        };
        let standing = Standing {
            round: RoundId {
                sale: SaleNumber(1),
                round: 1,
            },
            epoch: Epoch(2),
            counters,
            intent: Intent::Live,
            state: State::Open,
            window: Window {
                opens_at_ms: 1,
                closes_at_ms: None,
            },
            per_order_limit: 2,
            orders: 50,
            archived_rounds: 0,
            waiting: 0,
            now_ms: 5,
        };
        Self {
            redis: RoundAudit {
                keys: Ok(RoundKeys {
                    standing,
                    buyers: (30, 30),
                    board: (40, 40),
                    orders: (50, 50),
                    operations: (1, 1),
                    holds: (0, 0),
                    line: (0, 0),
                    next_hold_ms: None,
                    entry: entry(70),
                    journal: Some(counters),
                }),
                pseq: 75,
            },
            sums: RoundSums {
                position: entry(74),
                counted_at: entry(70),
                counters,
                intent: Intent::Live,
                provisioned: true,
                per_buyer_limit: 4,
                limit_scope: LimitScope::Round,
                initial_allocation: 100,
                restocked: 10,
                held: 0,
                held_orders: 0,
                sold: 50,
                confirmed_orders: 40,
                dead_letters: 0,
                dead: Delta::default(),
                events: 61,
                last_seq: 61,
                gap: None,
                duplicates: 0,
                buyers_above: 0,
                most_units: 4,
                mode: Mode::Committed,
                otherwise: 0,
                orders: 50,
                cancelled_orders: 10,
                waiting: 0,
                unexplained: 0,
                sale_orders: 50,
                sale_operations: 1,
                sale_letters: 0,
                others_final: true,
                certified: None,
                money: RoundMoney::default(),
            },
            sides: Sides::Read {
                orders: pair(50),
                board: pair(40),
                buyers: pair(30),
                others_sell: false,
                lacking: None,
            },
            orders: Some(HASH),
        }
    }

    fn keys(&mut self) -> &mut RoundKeys {
        self.redis.keys.as_mut().unwrap()
    }

    fn now(&mut self) -> &mut Counters {
        &mut self.keys().standing.counters
    }

    /// Orders, places and buyers.
    fn pairs(&mut self) -> (&mut Pair, &mut Pair, &mut Pair) {
        match &mut self.sides {
            Sides::Read {
                orders,
                board,
                buyers,
                ..
            } => (orders, board, buyers),
            Sides::Unread | Sides::Damaged(_) | Sides::Archived => panic!("not read"),
        }
    }

    fn checks(&self) -> Vec<Check> {
        let mut checks = judge(&self.redis, &self.sums, &self.sides, self.orders);
        checks.extend(judge_journal(&sound_journal()));
        checks
    }

    fn with(&self, status: Status) -> Vec<CheckName> {
        let checks = self.checks().into_iter();
        checks
            .filter(|check| check.status == status)
            .map(|check| check.name)
            .collect()
    }
}

/// Entries 40 to 75 are there, and stored up to 74.
fn sound_journal() -> Journal {
    let position = Position {
        epoch: Epoch(2),
        installed: Epoch(2),
        stored: entry(74),
    };
    Journal {
        before: position,
        after: position,
        epoch: Epoch(2),
        pseq: 75,
        length: Some(36),
        first: Some(entry(40)),
        last: Some(entry(75)),
        danger: None,
    }
}

#[test]
fn a_journal_must_have_every_entry_behind_the_position() {
    use CheckName as N;
    type Corruption = (fn(&mut Journal), &'static [CheckName], &'static str);
    let corruptions: &[Corruption] = &[
        (|_| {}, &[], ""),
        (
            |j| {
                j.first = Some(entry(75));
                j.length = Some(1);
            },
            &[],
            "",
        ),
        (
            |j| (j.length, j.first, j.last, j.pseq) = (Some(0), None, None, 74),
            &[],
            "",
        ),
        // What is gone may be stored while we look.
        (
            |j| {
                (j.length, j.first) = (Some(6), Some(entry(70)));
                j.before.stored = entry(60);
            },
            &[],
            "",
        ),
        (
            |j| {
                (j.length, j.first) = (Some(6), Some(entry(70)));
                (j.before.stored, j.after.stored) = (entry(60), entry(64));
            },
            &[N::Journal],
            "entries 65 to 69 are missing",
        ),
        (
            |j| (j.length, j.first, j.last) = (Some(0), None, None),
            &[N::Journal],
            "entries 75 to 75 are missing",
        ),
        (
            |j| j.length = Some(35),
            &[N::Journal],
            "35 entries from 40 to 75, the last should be 75",
        ),
        (
            |j| j.pseq = 76,
            &[N::Journal],
            "36 entries from 40 to 75, the last should be 76",
        ),
        (|j| j.length = None, &[N::Journal], "a key of another type"),
        (|j| j.epoch = Epoch(3), &[N::Epoch], "3"),
        (
            |j| j.danger = Some("maxmemory-policy is allkeys-lru".to_owned()),
            &[N::Settings],
            "maxmemory-policy is allkeys-lru",
        ),
    ];
    for (at, (corrupt, expected, actual)) in corruptions.iter().enumerate() {
        let mut journal = sound_journal();
        corrupt(&mut journal);
        let checks = judge_journal(&journal);
        let failing: Vec<_> = checks
            .iter()
            .filter(|check| check.status == Status::Fail)
            .collect();
        let names: Vec<_> = failing.iter().map(|check| check.name).collect();
        assert_eq!(names, *expected, "{at}");
        assert!(
            failing.iter().all(|check| check.actual == *actual),
            "{checks:#?}"
        );
    }
}

#[test]
fn a_later_timeline_that_the_journal_will_bring_is_waited_for() {
    let told = |stored: u64| {
        let mut journal = sound_journal();
        journal.epoch = Epoch(3);
        journal.last = journal.last.map(|last| JournalId {
            epoch: Epoch(3),
            ..last
        });
        journal.after.stored.pseq = stored;
        let checks = judge_journal(&journal);
        let check = checks.iter().find(|check| check.name == CheckName::Epoch);
        check.unwrap().status
    };
    assert_eq!(told(74), Status::Pending);
    // Nothing is left that could bring it.
    assert_eq!(told(75), Status::Fail);
}

#[test]
fn of_an_archived_round_only_postgresql_is_compared_with_its_certificate() {
    let mut evidence = Evidence::sound();
    evidence.sides = Sides::Archived;
    evidence.sums.certified = Some(HASH.to_owned());
    assert_eq!(verdict(&evidence.checks()), Status::Pass);
    evidence.orders = None;
    assert_eq!(evidence.with(Status::Pending), [CheckName::Certificate]);
    evidence.orders = Some("deadbeef");
    assert_eq!(evidence.with(Status::Fail), [CheckName::Certificate]);
}

#[test]
fn a_sound_round_passes_every_check_once() {
    let evidence = Evidence::sound();
    let checks = evidence.checks();
    assert_eq!(verdict(&checks), Status::Pass, "{checks:#?}");
    assert_eq!(evidence.with(Status::Pass), CheckName::ALL);
    assert!(
        checks
            .iter()
            .all(|check| !check.expected.is_empty() && !check.actual.is_empty())
    );
}

#[test]
fn each_corruption_is_found_by_its_checks_and_shows_both_numbers() {
    use CheckName as N;
    type Corruption = (&'static str, fn(&mut Evidence), &'static [CheckName]);
    let corruptions: &[Corruption] = &[
        (
            "a unit appeared in Redis",
            |e| e.now().remaining += 1,
            &[N::Conservation, N::RedisJournal, N::PostgresRedis],
        ),
        (
            "an order's units are in Redis twice",
            |e| e.now().held = 1,
            &[N::Conservation, N::RedisJournal, N::PostgresRedis],
        ),
        (
            "more is sold than there was",
            |e| {
                *e.now() = Counters {
                    sold: 111,
                    remaining: 0,
                    ..*e.now()
                }
            },
            &[
                N::Conservation,
                N::Bounds,
                N::RedisJournal,
                N::PostgresRedis,
            ],
        ),
        (
            "a round beyond all bounds",
            |e| {
                let all = ALLOCATION_MAX + 1;
                let now = Counters {
                    allocation: all,
                    remaining: all - 50,
                    ..*e.now()
                };
                *e.now() = now;
                e.keys().journal = Some(now);
                e.sums.counters = now;
                e.sums.initial_allocation = all - 10;
            },
            &[N::Bounds],
        ),
        (
            "the counters fell below zero",
            |e| {
                e.redis.keys = Err(Remains {
                    allocation: Some(110),
                    remaining: Some(-1),
                    held: Some(0),
                    sold: Some(111),
                    seq: Some(61),
                });
            },
            &[N::Bounds, N::RedisKeys, N::RedisJournal, N::PostgresRedis],
        ),
        (
            "the counters do not add up any more",
            |e| {
                e.redis.keys = Err(Remains {
                    allocation: Some(110),
                    remaining: Some(61),
                    held: Some(0),
                    sold: Some(50),
                    seq: Some(61),
                });
            },
            &[
                N::Conservation,
                N::RedisKeys,
                N::RedisJournal,
                N::PostgresRedis,
            ],
        ),
        (
            "the round is gone",
            |e| e.redis.keys = Err(Remains::default()),
            &[
                N::Conservation,
                N::Bounds,
                N::RedisKeys,
                N::RedisJournal,
                N::PostgresRedis,
                N::PostgresNotAhead,
            ],
        ),
        (
            "buyers are lost",
            |e| e.keys().buyers.1 = 29,
            &[N::RedisKeys, N::Buyers],
        ),
        (
            "the buyers are of another type",
            |e| e.keys().buyers.1 = -1,
            &[N::RedisKeys, N::Buyers],
        ),
        (
            "a place is lost",
            |e| e.keys().board.1 = 39,
            &[N::RedisKeys, N::Leaderboard],
        ),
        (
            "an order is lost",
            |e| e.keys().orders.1 = 49,
            &[N::RedisKeys],
        ),
        (
            "the round missed an entry",
            |e| {
                e.keys().journal.as_mut().unwrap().seq = 62;
            },
            &[N::RedisJournal],
        ),
        (
            "an entry vanished before it was stored",
            |e| {
                e.keys().journal = None;
                e.sums.position = entry(60);
                e.sums.counted_at = entry(60);
            },
            &[N::RedisJournal],
        ),
        (
            "the writer stored other counters",
            |e| {
                e.sums.counters = Counters {
                    remaining: 61,
                    sold: 49,
                    ..e.sums.counters
                }
            },
            &[N::PostgresRedis, N::PostgresSums],
        ),
        (
            "a pause was lost",
            |e| e.sums.intent = Intent::Paused,
            &[N::PostgresRedis],
        ),
        (
            "the writer passed an entry by",
            |e| e.sums.counted_at = entry(69),
            &[N::PostgresRedis],
        ),
        (
            "Redis was set back",
            |e| e.redis.pseq = 73,
            &[N::PostgresNotAhead],
        ),
        (
            "the round alone was set back",
            |e| {
                let now = Counters {
                    remaining: 61,
                    sold: 49,
                    seq: 60,
                    ..*e.now()
                };
                *e.now() = now;
                e.keys().journal = Some(now);
                e.keys().entry = entry(69);
            },
            &[N::PostgresNotAhead, N::PostgresRedis],
        ),
        (
            "the position was set back",
            |e| e.sums.position = entry(60),
            &[N::PostgresPosition],
        ),
        (
            "a row is gone",
            |e| {
                e.sums.sold = 49;
                e.sums.events = 60;
                e.sums.gap = Some(17);
            },
            &[N::PostgresSums, N::DenseSeq],
        ),
        (
            "a row is there twice",
            |e| {
                e.sums.sold = 51;
                e.sums.events = 62;
                e.sums.duplicates = 1;
            },
            &[N::PostgresSums, N::DenseSeq],
        ),
        (
            "a quantity was changed",
            |e| e.sums.sold = 55,
            &[N::PostgresSums],
        ),
        (
            "more orders than units",
            |e| e.sums.sold = 111,
            &[N::PostgresSums, N::NoOversell],
        ),
        (
            "a restock was invented",
            |e| e.sums.restocked = 20,
            &[N::PostgresSums],
        ),
        (
            "a buyer has more than the limit",
            |e| {
                e.sums.most_units = 5;
                e.sums.buyers_above = 1;
            },
            &[N::BuyerLimit],
        ),
        (
            "an order could not be stored",
            |e| {
                e.sums.dead_letters = 1;
                e.sums.dead.sold = 2;
                e.sums.sold = 48;
            },
            &[N::DeadLetters],
        ),
        (
            "a hold outlives its deadline",
            |e| e.keys().next_hold_ms = Some(-6_000),
            &[N::Holds],
        ),
        (
            "a hold is counted and not there",
            |e| e.keys().holds.0 = 1,
            &[N::RedisKeys],
        ),
        (
            "somebody waits in PostgreSQL alone",
            |e| e.sums.waiting = 1,
            &[N::Line],
        ),
        (
            "a held order of a dead letter",
            |e| {
                e.sums.dead_letters = 1;
                e.sums.dead.held = 2;
            },
            &[N::PostgresSums, N::DeadLetters],
        ),
        (
            "an order is not as durable as promised",
            |e| e.sums.otherwise = 1,
            &[N::Durability],
        ),
        (
            "an order is only in Redis",
            |e| {
                let (orders, board, _) = e.pairs();
                orders.differ(|| "order 40".to_owned());
                board.postgres = 39;
                e.sums.sale_orders = 49;
            },
            &[N::Orders, N::Leaderboard, N::SaleCounts],
        ),
        (
            "two orders changed places",
            |e| e.pairs().1.differ(|| "place 3".to_owned()),
            &[N::Leaderboard],
        ),
        (
            "a buyer has more in Redis",
            |e| e.pairs().2.differ(|| "buyer 7".to_owned()),
            &[N::Buyers],
        ),
        (
            "there are buyers whom PostgreSQL does not know",
            |e| e.pairs().2.postgres = 29,
            &[N::Buyers],
        ),
        (
            "what belongs to the round cannot be read",
            |e| e.sides = Sides::Damaged("orders".to_owned()),
            &[N::Orders, N::Leaderboard, N::Buyers],
        ),
        (
            "an operation is lost",
            |e| e.keys().operations.1 = 0,
            &[N::RedisKeys],
        ),
        (
            "an operation was never carried out in Redis",
            |e| e.sums.sale_operations = 2,
            &[N::SaleCounts],
        ),
        (
            "an order of the sale is only in Redis",
            |e| e.keys().standing.orders = 51,
            &[N::SaleCounts],
        ),
        (
            "a status has no event",
            |e| e.sums.unexplained = 1,
            &[N::Statuses],
        ),
        (
            "the orders are not those of the certificate",
            |e| e.sums.certified = Some("deadbeef".to_owned()),
            &[N::Certificate],
        ),
    ];
    for (name, corrupt, expected) in corruptions {
        let mut evidence = Evidence::sound();
        corrupt(&mut evidence);
        let mut failing = evidence.with(Status::Fail);
        let mut expected = expected.to_vec();
        failing.sort_unstable();
        expected.sort_unstable();
        assert_eq!(failing, expected, "{name}");
        assert_eq!(verdict(&evidence.checks()), Status::Fail, "{name}");
        for check in evidence.checks() {
            if check.status == Status::Fail {
                assert_ne!(check.expected, check.actual, "{name}: {check:?}");
            }
        }
    }
}

#[test]
fn while_the_writer_is_on_its_way_nothing_is_compared_and_nothing_is_passed() {
    let mut evidence = Evidence::sound();
    evidence.sums.position = entry(65);
    evidence.sums.counted_at = entry(64);
    let before = Counters {
        remaining: 62,
        sold: 48,
        seq: 59,
        ..evidence.sums.counters
    };
    evidence.sums.counters = before;
    evidence.sums.sold = 48;
    evidence.sums.events = 59;
    evidence.sums.last_seq = 59;
    evidence.sums.sale_orders = 48;
    for sides in [Sides::Unread, Sides::Archived, evidence.sides.clone()] {
        evidence.sides = sides;
        assert_eq!(evidence.with(Status::Fail), []);
        assert_eq!(
            evidence.with(Status::Pending),
            [
                CheckName::PostgresRedis,
                CheckName::Line,
                CheckName::Orders,
                CheckName::Leaderboard,
                CheckName::Buyers
            ]
        );
        assert_eq!(verdict(&evidence.checks()), Status::Pending);
    }
    // A lie of PostgreSQL about itself shows even so.
    evidence.sums.sold = 47;
    assert_eq!(evidence.with(Status::Fail), [CheckName::PostgresSums]);
}

#[test]
fn an_entry_that_was_stored_and_trimmed_is_compared_with_what_was_stored() {
    let mut evidence = Evidence::sound();
    evidence.keys().journal = None;
    assert_eq!(verdict(&evidence.checks()), Status::Pass);
    evidence.sums.counters.seq = 62;
    assert!(
        evidence
            .with(Status::Fail)
            .contains(&CheckName::RedisJournal)
    );
}

#[test]
fn a_round_that_redis_does_not_have_yet_is_pending() {
    let mut evidence = Evidence::sound();
    let fresh = Counters::fresh(100);
    evidence.redis.keys = Err(Remains::default());
    evidence.sums = RoundSums {
        position: entry(60),
        counted_at: JournalId::default(),
        counters: fresh,
        provisioned: false,
        restocked: 0,
        sold: 0,
        confirmed_orders: 0,
        events: 0,
        last_seq: 0,
        most_units: 0,
        ..evidence.sums
    };
    evidence.sides = Sides::Unread;
    evidence.orders = None;
    assert_eq!(evidence.with(Status::Fail), []);
    assert_eq!(verdict(&evidence.checks()), Status::Pending);
    // Somebody said that Redis has it.
    evidence.sums.provisioned = true;
    assert!(evidence.with(Status::Fail).contains(&CheckName::RedisKeys));
}

#[test]
fn money_without_goods_and_goods_without_money_are_found_once_all_is_stored() {
    type Wrong = fn(&mut RoundMoney);
    let wrongs: [Wrong; 3] = [
        |money| money.unpaid = 1,
        |money| money.differing = 1,
        |money| money.stuck = 1,
    ];
    for wrong in wrongs {
        let mut evidence = Evidence::sound();
        evidence.sums.money.payments = 50;
        wrong(&mut evidence.sums.money);
        assert_eq!(evidence.with(Status::Fail), [CheckName::Payments]);
        // The writer is on its way: the order may be about to say so, too.
        evidence.sums.counted_at = entry(59);
        assert!(!evidence.with(Status::Fail).contains(&CheckName::Payments));
    }
}

#[test]
fn no_check_is_no_verdict() {
    assert_eq!(verdict(&[]), Status::Pending);
}
