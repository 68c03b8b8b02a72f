//! The history of a concurrent run as its clients saw it, and what is left of it in the stores at
//! the end: all that [`judge`] needs to say whether the promises were kept.

mod checker;
mod course;
#[cfg(test)]
mod tests;

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use reqwest::RequestBuilder;
use serde_json::Value;
use sqlx::Row;
use stockade::domain::id::{BuyerId, OrderId, SaleNumber};
use uuid::Uuid;

use super::app::{App, sql};

pub(crate) use checker::judge;

/// What was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Purchase { quantity: u64 },
    Cancel { order: Uuid },
    Pay { order: Uuid },
    Extend { order: Uuid },
    Join { quantity: u64 },
    Leave,
    Restock { units: u64 },
    Reduce { units: u64 },
    Pause,
    Resume,
    Close,
}

/// What its client may believe.
#[derive(Clone, Debug)]
pub(crate) enum Outcome {
    /// 200 or 201, read to its end.
    Ok {
        body: String,
        /// Whether it said `Idempotency-Replayed: true`.
        replayed: bool,
    },
    /// A problem that says `not_applied`.
    Refused {
        code: String,
        /// Whether it may have come from a node's memory, without the key having been looked up.
        from_memory: bool,
        /// The document.
        problem: Value,
    },
    /// A problem that says `unknown`, a broken connection, no answer in time.
    Unknown(String),
}

/// One attempt. Instants count from the beginning of the history.
#[derive(Clone, Debug)]
pub(crate) struct Attempt {
    pub(crate) sale: Uuid,
    pub(crate) kind: Kind,
    /// The buyer, or the operator: one of its own for each thing that is done once.
    pub(crate) who: Uuid,
    /// Empty where there is none.
    pub(crate) key: String,
    pub(crate) sent: Duration,
    /// When its outcome was known, or it was given up.
    pub(crate) received: Duration,
    pub(crate) outcome: Outcome,
}

/// Writes down what happens. Shared by all clients of a run.
#[derive(Debug)]
pub(crate) struct Recorder {
    began: Instant,
    attempts: Mutex<Vec<Attempt>>,
    /// Since when no earlier attempt can have an effect any more.
    settled: Mutex<Option<Duration>>,
}

impl Default for Recorder {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            attempts: Mutex::default(),
            settled: Mutex::default(),
        }
    }
}

impl Recorder {
    /// Sends a request once, writes down what came of it, and gives it.
    pub(crate) async fn ask(
        &self,
        sale: Uuid,
        kind: Kind,
        who: Uuid,
        key: &str,
        request: RequestBuilder,
    ) -> Outcome {
        let sent = self.began.elapsed();
        let outcome = outcome(request)
            .await
            .unwrap_or_else(|error| Outcome::Unknown(error.to_string()));
        let attempt = Attempt {
            sale,
            kind,
            who,
            key: key.to_owned(),
            sent,
            received: self.began.elapsed(),
            outcome: outcome.clone(),
        };
        self.attempts.lock().unwrap().push(attempt);
        outcome
    }

    /// From now on, whatever was sent before has had its effect or has none: every node runs, and
    /// every deadline has passed. What is refused after this is refused for good.
    pub(crate) fn settle(&self) {
        *self.settled.lock().unwrap() = Some(self.began.elapsed());
    }

    /// All that has happened so far.
    pub(crate) fn history(&self) -> History {
        History {
            attempts: self.attempts.lock().unwrap().clone(),
            settled: self.settled.lock().unwrap().unwrap_or(Duration::MAX),
        }
    }
}

async fn outcome(request: RequestBuilder) -> reqwest::Result<Outcome> {
    let response = request.send().await?;
    let (status, headers) = (response.status(), response.headers().clone());
    let body = response.text().await?;
    if status.is_success() {
        let replayed = headers.get("idempotency-replayed");
        return Ok(Outcome::Ok {
            body,
            replayed: replayed.is_some_and(|value| value == "true"),
        });
    }
    let problem: Value = serde_json::from_str(&body).unwrap_or_default();
    Ok(if problem["outcome"] == "not_applied" {
        Outcome::Refused {
            code: problem["code"].as_str().unwrap_or_default().to_owned(),
            from_memory: problem["retry"] == "same_key",
            problem,
        }
    } else {
        Outcome::Unknown(format!("{status}: {body}"))
    })
}

/// What the clients saw, in no order.
#[derive(Clone, Debug)]
pub(crate) struct History {
    pub(crate) attempts: Vec<Attempt>,
    /// Refusals of requests sent after this are for good.
    pub(crate) settled: Duration,
}

/// An order as PostgreSQL has it.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    pub(crate) epoch: i32,
    pub(crate) seq: i64,
    pub(crate) id: Uuid,
    pub(crate) buyer: Uuid,
    pub(crate) quantity: i64,
    pub(crate) unit_price: i64,
    pub(crate) accepted_at: DateTime<Utc>,
    pub(crate) status: String,
    pub(crate) accepted_as: String,
    pub(crate) hold_ms: i64,
    pub(crate) extended_ms: i64,
    pub(crate) returned: i64,
    pub(crate) refunded: i64,
}

/// Another event of the round as PostgreSQL has it; the provisioning left out.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) epoch: i32,
    pub(crate) seq: i64,
    pub(crate) kind: String,
    pub(crate) units: i64,
    pub(crate) order: Option<Uuid>,
    pub(crate) actor: Option<Uuid>,
    pub(crate) at: DateTime<Utc>,
    pub(crate) from_held: bool,
}

/// Where the units are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counters {
    pub(crate) allocation: i64,
    pub(crate) remaining: i64,
    pub(crate) held: i64,
    pub(crate) sold: i64,
    pub(crate) seq: i64,
}

/// What is left of a sale with one round at the end.
#[derive(Clone, Debug)]
pub(crate) struct Sale {
    pub(crate) id: Uuid,
    pub(crate) number: u32,
    pub(crate) initial_allocation: i64,
    pub(crate) per_buyer_limit: i64,
    pub(crate) opens_at: DateTime<Utc>,
    pub(crate) closes_at: Option<DateTime<Utc>>,
    /// As PostgreSQL has them.
    pub(crate) stored: Counters,
    /// As Redis has them.
    pub(crate) live: Counters,
    /// In any order.
    pub(crate) orders: Vec<Order>,
    /// In any order.
    pub(crate) events: Vec<Event>,
    /// The leaderboard: `rank`, `seq`, `quantity`, `accepted_at`.
    pub(crate) board: Vec<Value>,
}

impl Sale {
    /// Reads everything, once the writer has stored everything.
    pub(crate) async fn read(app: &App, sale: &str) -> Self {
        let id: Uuid = sale.parse().unwrap();
        let mut sql = sql(app).await;
        let row = sqlx::query(
            "SELECT number, initial_allocation, r.per_buyer_limit, r.opens_at, r.closes_at,
                    r.allocation, remaining, held, sold, seq
             FROM sales s JOIN rounds r ON r.sale = s.number WHERE s.id = $1",
        )
        .bind(id)
        .fetch_one(&mut sql)
        .await
        .unwrap();
        let number: i32 = row.get("number");
        let orders = sqlx::query("SELECT * FROM orders WHERE sale = $1")
            .bind(number)
            .fetch_all(&mut sql)
            .await
            .unwrap();
        let events = sqlx::query("SELECT * FROM round_events WHERE sale = $1 AND seq > 0")
            .bind(number)
            .fetch_all(&mut sql)
            .await
            .unwrap();
        let view = app.view(sale).await;
        let count = |member: &str| view[member].as_i64().unwrap();
        Self {
            id,
            number: number.try_into().unwrap(),
            initial_allocation: row.get("initial_allocation"),
            per_buyer_limit: row.get("per_buyer_limit"),
            opens_at: row.get("opens_at"),
            closes_at: row.get("closes_at"),
            stored: Counters {
                allocation: row.get("allocation"),
                remaining: row.get("remaining"),
                held: row.get("held"),
                sold: row.get("sold"),
                seq: row.get("seq"),
            },
            live: Counters {
                allocation: count("allocation"),
                remaining: count("remaining"),
                held: count("held"),
                sold: count("sold"),
                seq: count("seq"),
            },
            orders: orders
                .iter()
                .map(|row| Order {
                    epoch: row.get("epoch"),
                    seq: row.get("seq"),
                    id: row.get("id"),
                    buyer: row.get("buyer_id"),
                    quantity: row.get("quantity"),
                    unit_price: row.get("unit_price"),
                    accepted_at: row.get("accepted_at"),
                    status: row.get("status"),
                    accepted_as: row.get("accepted_as"),
                    hold_ms: row.get("hold_ms"),
                    extended_ms: row.get("extended_ms"),
                    returned: row.get("returned"),
                    refunded: row.get("refunded"),
                })
                .collect(),
            events: events
                .iter()
                .map(|row| Event {
                    epoch: row.get("epoch"),
                    seq: row.get("seq"),
                    kind: row.get("kind"),
                    units: row.get("units"),
                    order: row.get("order_id"),
                    actor: row.get("actor"),
                    at: row.get("at"),
                    from_held: row.get("from_held"),
                })
                .collect(),
            board: app.pages(&format!("/v1/sales/{sale}/leaderboard")).await,
        }
    }

    /// The id of the order that this buyer's key makes.
    fn order_id(&self, buyer: Uuid, key: &str) -> Uuid {
        OrderId::derive(SaleNumber(self.number), BuyerId(buyer), key).0
    }

    /// The id of the order that this buyer's place in line becomes.
    fn wish_id(&self, buyer: Uuid, key: &str) -> Uuid {
        self.order_id(buyer, &format!("\u{1}waitlist {key}"))
    }
}

/// Judges what was recorded of these sales, whose audits pass.
///
/// # Panics
/// With the first violation of each rule, and how to repeat the run.
pub(crate) async fn assert_kept(recorder: &Recorder, app: &App, sales: &[String], repeat: &str) {
    let history = recorder.history();
    let mut found = Vec::new();
    for sale in sales {
        found.extend(judge(&history, &Sale::read(app, sale).await));
    }
    assert!(
        found.is_empty(),
        "{} (repeat with {repeat})",
        found
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("\n")
    );
}
