//! A sound history passes; each kind of violation, planted in it, is caught by its own check.

use chrono::TimeDelta;
use serde_json::json;

use super::*;
use crate::operator::AuditCheck;

const SALE: Uuid = Uuid::from_u128(0xa11);

fn opens_at() -> DateTime<Utc> {
    "2026-11-21T12:00:00.000Z".parse().unwrap()
}

fn buyer(n: usize) -> Uuid {
    Uuid::from_u128(0xb00_0000 + n as u128)
}

/// 20 buyers came for 5 units, one after the other.
fn sound() -> History {
    let order = |n: usize| Order {
        id: Uuid::from_u128(0xc00_0000 + n as u128),
        sale_id: SALE,
        buyer_id: buyer(n),
        quantity: 1,
        seq: n as u64 + 1,
        accepted_at: opens_at() + TimeDelta::milliseconds(n.try_into().unwrap()),
    };
    let frame = |remaining: u64| Frame {
        event: "stock".to_owned(),
        id: format!("1-{}", 5 - remaining),
        stock: Ok(Stock {
            allocation: 5,
            remaining,
            held: 0,
            sold: 5 - remaining,
        }),
    };
    History {
        sale: SALE,
        opens_at: opens_at(),
        allocation: 5,
        per_buyer_limit: 1,
        quantity: 1,
        orders_expected: (5, 5),
        purchases: (0..20)
            .map(|n| Purchase {
                buyer: buyer(n),
                first_sent: Some(Duration::from_millis(n as u64 * 10)),
                finished: Duration::from_millis(n as u64 * 10 + 5),
                ending: if n < 5 {
                    Ending::Accepted(Ok(order(n)))
                } else {
                    Ending::Refused("sold_out".to_owned())
                },
            })
            .collect(),
        rows: Ok((0..5).map(order).map(|order| row(&order)).collect()),
        leaderboard: Ok((0..5)
            .map(order)
            .map(|order| Place {
                rank: order.seq,
                buyer: format!("pseudonym {}", order.seq),
                quantity: 1,
                accepted_at: order.accepted_at,
                seq: order.seq,
            })
            .collect()),
        after: Ok(Sale {
            id: SALE,
            state: "open".to_owned(),
            allocation: 5,
            remaining: 0,
            held: 0,
            sold: 5,
        }),
        closed: Ok("closed".to_owned()),
        audit: Ok(Audit {
            verdict: "pass".to_owned(),
            checks: Vec::new(),
        }),
        frames: Some(vec![frame(5), frame(3), frame(0)]),
        replays: vec![Replay {
            purchase: 0,
            when: "after the end",
            first: Bytes::from_static(b"{}"),
            again: Ok(Bytes::from_static(b"{}")),
        }],
    }
}

fn row(order: &Order) -> Row {
    Row {
        id: order.id,
        buyer_id: order.buyer_id,
        quantity: order.quantity.try_into().unwrap(),
        seq: order.seq.try_into().unwrap(),
        status: "confirmed".to_owned(),
    }
}

fn order(history: &mut History, n: usize) -> &mut Order {
    match &mut history.purchases[n].ending {
        Ending::Accepted(Ok(order)) => order,
        other => panic!("{other:?}"),
    }
}

fn rows(history: &mut History) -> &mut Vec<Row> {
    history.rows.as_mut().unwrap()
}

fn places(history: &mut History) -> &mut Vec<Place> {
    history.leaderboard.as_mut().unwrap()
}

fn frames(history: &mut History) -> &mut Vec<Frame> {
    history.frames.as_mut().unwrap()
}

fn failed(history: &History) -> Vec<Cow<'static, str>> {
    check(history)
        .iter()
        .filter(|check| check.status == Status::Fail)
        .inspect(|check| assert!(!check.counter_example.is_empty()))
        .map(|check| check.name.clone())
        .collect()
}

/// Plants a violation and says which checks found it.
fn planted(violation: impl FnOnce(&mut History)) -> Vec<Cow<'static, str>> {
    let mut history = sound();
    violation(&mut history);
    failed(&history)
}

/// Plants a violation that the named check must find.
fn caught(name: &str, violation: impl FnOnce(&mut History)) {
    let found = planted(violation);
    assert!(
        found.iter().any(|found| found == name),
        "{name:?} is not among {found:?}"
    );
}

#[test]
fn a_sound_history_passes_every_check() {
    assert_eq!(failed(&sound()), [""; 0]);
}

#[test]
fn overselling_is_caught() {
    caught("exactly the stock", |history| {
        let mut extra = order(history, 4).clone();
        (extra.id, extra.seq, extra.buyer_id) = (Uuid::from_u128(1), 6, buyer(5));
        rows(history).push(row(&extra));
        history.purchases[5].ending = Ending::Accepted(Ok(extra));
    });
    caught("exactly the stock", |history| {
        let mut hidden = row(order(history, 4));
        (hidden.id, hidden.seq) = (Uuid::from_u128(1), 6);
        rows(history).push(hidden);
    });
}

#[test]
fn units_left_on_the_shelf_are_caught() {
    caught("exactly the stock", |history| {
        history.purchases[4].ending = Ending::Refused("sold_out".to_owned());
        rows(history).pop();
    });
}

#[test]
fn an_answer_for_somebody_else_is_caught() {
    caught("answers name their purchase", |history| {
        order(history, 2).buyer_id = buyer(7);
    });
    caught("answers name their purchase", |history| {
        order(history, 2).quantity = 2;
    });
    caught("answers name their purchase", |history| {
        order(history, 2).sale_id = buyer(0);
    });
    caught("answers name their purchase", |history| {
        history.purchases[2].ending = Ending::Accepted(Err("not JSON".to_owned()));
    });
}

#[test]
fn one_order_for_two_purchases_is_caught() {
    caught("an order for each 201", |history| {
        order(history, 1).id = Uuid::from_u128(0xc00_0000);
    });
}

#[test]
fn gaps_and_doubles_of_seq_are_caught() {
    caught("seq without gaps", |history| order(history, 4).seq = 6);
    caught("seq without gaps", |history| order(history, 4).seq = 4);
    caught("seq without gaps", |history| {
        for n in 0..5 {
            order(history, n).seq += 1;
        }
    });
}

#[test]
fn overtaking_is_caught() {
    assert_eq!(
        planted(|history| {
            let (first, second) = (order(history, 0).seq, order(history, 1).seq);
            order(history, 0).seq = second;
            order(history, 1).seq = first;
            rows(history)[0].seq = 2;
            rows(history)[1].seq = 1;
            let times = [0, 1].map(|n| order(history, n).accepted_at);
            (
                places(history)[0].accepted_at,
                places(history)[1].accepted_at,
            ) = (times[1], times[0]);
        }),
        ["first come, first served"]
    );
}

#[test]
fn an_early_acceptance_is_caught() {
    caught("nobody before the start", |history| {
        order(history, 0).accepted_at = opens_at() - TimeDelta::milliseconds(1);
    });
}

#[test]
fn selling_after_sold_out_is_caught() {
    assert_eq!(
        planted(|history| history.purchases[4].finished = Duration::from_millis(100)),
        [""; 0],
        "who asked before somebody was told sold_out may be answered after"
    );
    caught("sold out is final", |history| {
        history.purchases[6].finished = Duration::from_millis(35);
    });
}

#[test]
fn breaking_the_limit_is_caught() {
    caught("limit per buyer", |history| {
        order(history, 1).buyer_id = buyer(0);
        history.purchases[1].buyer = buyer(0);
    });
    caught("limit per buyer", |history| {
        history.purchases[9].ending = Ending::Refused("buyer_limit".to_owned());
    });
}

#[test]
fn every_difference_to_postgresql_is_caught() {
    const NAME: &str = "orders in PostgreSQL";
    caught(NAME, |history| drop(rows(history).pop()));
    caught(NAME, |history| rows(history)[1].seq = 9);
    caught(NAME, |history| rows(history)[1].quantity = -1);
    caught(NAME, |history| rows(history)[1].buyer_id = buyer(7));
    caught(NAME, |history| {
        rows(history)[1].status = "cancelled".to_owned();
    });
    caught(NAME, |history| {
        let double = rows(history)[1].clone();
        rows(history).push(double);
    });
    caught(NAME, |history| {
        history.rows = Err("not connected".to_owned());
    });
    // Refused, and stored all the same.
    caught(NAME, |history| {
        let mut stored = rows(history)[4].clone();
        (stored.id, stored.buyer_id) = (Uuid::from_u128(1), buyer(12));
        rows(history).push(stored);
    });
    // Failed without ever being sent, and stored all the same.
    caught(NAME, |history| {
        history.purchases[4].ending = Ending::Failed("not connected".to_owned());
    });
}

#[test]
fn an_unknown_purchase_may_be_stored_or_not() {
    let unknown = || Ending::Unknown("connection lost".to_owned());
    assert_eq!(
        planted(|history| history.purchases[4].ending = unknown()),
        [""; 0]
    );
    assert_eq!(
        planted(|history| {
            history.purchases[4].ending = unknown();
            history.orders_expected = (4, 5);
            rows(history).pop();
            places(history).pop();
            history.after.as_mut().unwrap().remaining = 1;
            history.after.as_mut().unwrap().sold = 4;
            let last = frames(history).last_mut().unwrap();
            let stock = last.stock.as_mut().unwrap();
            (stock.remaining, stock.sold) = (1, 4);
            // Nobody was told that it is sold out while a unit is left.
            history.purchases.truncate(5);
        }),
        [""; 0]
    );
}

#[test]
fn a_wrong_leaderboard_is_caught() {
    const NAME: &str = "leaderboard by seq";
    caught(NAME, |history| drop(places(history).pop()));
    caught(NAME, |history| places(history).swap(0, 1));
    caught(NAME, |history| places(history)[2].rank = 4);
    caught(NAME, |history| places(history)[2].quantity = 2);
    caught(NAME, |history| places(history)[2].accepted_at = opens_at());
    caught(NAME, |history| {
        places(history)[2].buyer = "pseudonym 1".to_owned();
    });
    caught(NAME, |history| {
        places(history)[2].buyer = buyer(2).to_string();
    });
    caught(NAME, |history| {
        history.leaderboard = Err("status 500".to_owned());
    });
}

#[test]
fn wrong_counters_are_caught() {
    const NAME: &str = "counters of the sale";
    caught(NAME, |history| {
        history.after.as_mut().unwrap().remaining = 1;
    });
    caught(NAME, |history| history.after.as_mut().unwrap().held = 1);
    caught(NAME, |history| history.after = Err("status 500".to_owned()));
}

#[test]
fn a_wrong_live_stock_is_caught() {
    const NAME: &str = "live stock";
    caught(NAME, |history| frames(history).clear());
    caught(NAME, |history| drop(frames(history).pop()));
    caught(NAME, |history| drop(frames(history).remove(0)));
    caught(NAME, |history| {
        frames(history)[1].stock.as_mut().unwrap().held = 1;
    });
    caught(NAME, |history| {
        frames(history)[1].stock = Err("not JSON".to_owned());
    });
    caught(NAME, |history| frames(history)[1].id = "1-9".to_owned());
    caught(NAME, |history| frames(history)[1].id = String::new());
    caught(NAME, |history| {
        let again = frames(history)[0].clone();
        frames(history).insert(
            2,
            Frame {
                id: "1-4".to_owned(),
                ..again
            },
        );
    });
}

#[test]
fn frame_ids_are_ordered_by_their_numbers() {
    assert!(order_of("1-10").unwrap() > order_of("1-9").unwrap());
    assert!(order_of("2-0").unwrap() > order_of("1-9").unwrap());
    assert!(order_of("17").is_some());
    assert_eq!(order_of("first"), None);
}

#[test]
fn no_subscriber_is_shown_as_skipped() {
    let mut history = sound();
    history.frames = None;
    let checks = check(&history);
    let live = checks
        .iter()
        .find(|check| check.name == "live stock")
        .unwrap();
    assert_eq!(live.status, Status::Skipped);
    assert_eq!(failed(&history), [""; 0]);
}

#[test]
fn a_sale_that_does_not_end_is_caught() {
    caught("the sale ends", |history| {
        history.closed = Ok("open".to_owned());
    });
    caught("the sale ends", |history| {
        history.closed = Err("status 500".to_owned());
    });
}

#[test]
fn a_retry_that_is_not_answered_the_same_is_caught() {
    const NAME: &str = "same 201 for a retry";
    caught(NAME, |history| {
        history.replays[0].again = Ok(Bytes::from_static(b"{ }"));
    });
    caught(NAME, |history| {
        history.replays[0].again = Err("status 409".to_owned());
    });
}

#[test]
fn the_servers_own_audit_is_heard() {
    const NAME: &str = "the server's audit";
    caught(NAME, |history| {
        history.audit.as_mut().unwrap().verdict = "pending".to_owned();
    });
    caught(NAME, |history| {
        history.audit = Ok(Audit {
            verdict: "fail".to_owned(),
            checks: vec![AuditCheck {
                name: "conservation".to_owned(),
                status: "fail".to_owned(),
                expected: json!(5),
                actual: json!(6),
            }],
        });
    });
    caught(NAME, |history| history.audit = Err("status 500".to_owned()));
}

#[test]
fn a_large_history_is_checked_quickly_and_its_proof_is_short() {
    let mut history = sound();
    let n = 100_000;
    let template = history.purchases[0].clone();
    history.purchases = (0..n)
        .map(|n| {
            let mut purchase = template.clone();
            purchase.buyer = buyer(n);
            purchase.ending = Ending::Accepted(Ok(Order {
                id: Uuid::from_u128(n as u128 + 1),
                sale_id: SALE,
                buyer_id: buyer(n),
                quantity: 1,
                seq: n as u64 + 1,
                accepted_at: opens_at() - TimeDelta::milliseconds(1),
            }));
            purchase
        })
        .collect();
    let checks = check(&history);
    let window = checks
        .iter()
        .find(|check| check.name == "nobody before the start")
        .unwrap();
    assert_eq!(window.actual, n.to_string());
    assert_eq!(window.counter_example.len(), EXAMPLES + 1);
}

#[test]
fn over_several_sales_a_promise_is_kept_only_in_all_of_them() {
    let sound = check(&sound());
    let all = of_all(vec![sound.clone(), sound.clone()]);
    assert_eq!(all.len(), sound.len());
    assert!(all.iter().all(|check| check.status != Status::Fail));
    let mut broken = sound.clone();
    broken[3].status = Status::Fail;
    let all = of_all(vec![sound, broken]);
    let failed: Vec<usize> = (0..all.len())
        .filter(|n| all[*n].status == Status::Fail)
        .collect();
    assert_eq!(failed, [3]);
}
