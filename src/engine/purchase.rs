//! Purchases: many in one call of `purchase.lua`.

use std::{sync::Arc, time::Instant};

use bytes::Bytes;

use super::{
    Engine, Shared,
    call::Called,
    coalescer::{Coalescer, Lane},
    connection::Connection,
    error::EngineError,
    packed::{self, ITEM_BYTES, Unpack},
    reply::Reply,
};
use crate::{
    domain::{
        id::RoundId,
        limits::{CALL_ARGUMENT_BYTES_MAX, CALL_ITEMS_MAX, CALL_ROUNDS_MAX},
        order::{Decision, Durability, Purchase, Refusal},
    },
    faults,
};

// The caps of a call fit together.
const _: () = assert!(CALL_ITEMS_MAX * ITEM_BYTES <= CALL_ARGUMENT_BYTES_MAX);
const _: () = assert!(CALL_ROUNDS_MAX <= CALL_ITEMS_MAX && CALL_ROUNDS_MAX < 255);

/// What became of a purchase, and what that is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The decision.
    pub decision: Decision,
    /// Whether a script looked the key up: only then is a refusal final for the key.
    pub looked_up: bool,
    /// Redis' clock at the decision, milliseconds since the Unix epoch.
    pub now_ms: i64,
}

/// The lane of purchases.
pub(super) struct PurchaseLane {
    pub(super) shared: Arc<Shared>,
    pub(super) connection: Arc<Connection>,
    /// The key that signs the receipts of what it accepts; 0 for none.
    pub(super) receipt_key: u8,
    /// Replicas that must have an order before anybody hears of it; 0 for none.
    pub(super) replicas: u32,
}

impl Lane for PurchaseLane {
    type Item = Purchase;
    type Answer = Result<Answer, EngineError>;
    type Room = (usize, Vec<RoundId>);

    fn fits((items, rounds): &mut Self::Room, purchase: &Purchase) -> bool {
        let known = rounds.contains(&purchase.round);
        if *items == CALL_ITEMS_MAX || (!known && rounds.len() == CALL_ROUNDS_MAX) {
            return false;
        }
        *items += 1;
        if !known {
            rounds.push(purchase.round);
        }
        true
    }

    async fn call(&self, items: Vec<Purchase>) -> Result<Vec<Self::Answer>, EngineError> {
        self.decide(&items, false).await
    }
}

impl PurchaseLane {
    /// Has purchases decided in one call; `together` all of them are accepted, or none.
    async fn decide(
        &self,
        items: &[Purchase],
        together: bool,
    ) -> Result<Vec<Result<Answer, EngineError>>, EngineError> {
        let Shared {
            keys,
            scripts,
            view,
            metrics,
            ..
        } = &*self.shared;
        // A fenced partition is asked nothing, and counts no call.
        view.epoch()?;
        let mut rounds: Vec<RoundId> = Vec::new();
        let mut packed_items = Vec::with_capacity(items.len() * ITEM_BYTES);
        for purchase in items {
            let index = rounds.iter().position(|round| *round == purchase.round);
            let index = index.unwrap_or_else(|| {
                rounds.push(purchase.round);
                rounds.len() - 1
            });
            let index = u8::try_from(index).map_err(|_| EngineError::Overloaded(rounds.len()))?;
            packed::push_item(&mut packed_items, index, purchase);
        }
        let mut names = Vec::with_capacity(2 + 7 * rounds.len());
        names.extend([keys.meta(), keys.journal()]);
        for round in &rounds {
            names.extend([
                keys.round(*round),
                keys.buyers(*round),
                keys.board(*round),
                keys.holds(*round),
                keys.sale(round.sale),
                keys.orders(round.sale),
                keys.sale_buyers(round.sale),
            ]);
        }
        let arguments = vec![
            self.receipt_key.to_string().into(),
            packed_items.into(),
            Bytes::from_static(if together { b"all" } else { b"" }),
        ];

        metrics.calls.inc();
        #[expect(clippy::cast_precision_loss, reason = "at most 128")]
        metrics.call_items.observe(items.len() as f64);
        let sent_at = Instant::now();
        faults::point("purchase.before_script");
        let called = if self.replicas == 0 {
            self.shared
                .call(&self.connection, &scripts.purchase, names, arguments)
                .await
                .map(|called| (called, 0))
        } else {
            let (script, replicas) = (&scripts.purchase, self.replicas);
            self.shared
                .call_replicated(&self.connection, script, &names, arguments, replicas)
                .await
        };
        faults::point("purchase.after_script");
        metrics
            .call_seconds
            .observe(sent_at.elapsed().as_secs_f64());
        let (
            Called {
                mut reply,
                epoch,
                head,
                sent_at,
            },
            acks,
        ) = called?;
        if reply.number::<usize>()? != rounds.len() {
            return Err(reply.unexpected("number of rounds"));
        }
        for round in &rounds {
            let standing = reply.standing(epoch, head.now_ms)?;
            self.shared.note_damage(*round, standing.is_none());
            if let Some(standing) = standing {
                self.shared.learn(&standing, sent_at);
            }
        }
        let mut answers = Vec::with_capacity(items.len());
        for purchase in items {
            let answer = decision(&mut reply, purchase)?.and_then(|decision| {
                replicated(&decision, acks, self.replicas)?;
                Ok(Answer {
                    decision,
                    looked_up: true,
                    now_ms: head.now_ms,
                })
            });
            answers.push(answer);
        }
        // Before anybody is told: from now on this node can tell of them.
        let orders = answers
            .iter()
            .flatten()
            .filter_map(|answer| match &answer.decision {
                Decision::Accepted(order) | Decision::Replayed(order) => Some(order),
                Decision::Refused(_) => None,
            });
        self.shared.unstored.note(orders);
        if reply.is_empty() {
            Ok(answers)
        } else {
            Err(reply.unexpected("too long"))
        }
    }
}

/// Whether a decision may be told: of an order only when enough replicas have it, and of a replayed
/// one, too, because nobody knows whether its first answer waited long enough.
fn replicated(decision: &Decision, acks: u32, wanted: u32) -> Result<(), EngineError> {
    match decision {
        Decision::Accepted(_) | Decision::Replayed(_)
            if acks < wanted && !faults::bug("wait_ignored") =>
        {
            Err(EngineError::Unreplicated { acks, wanted })
        }
        Decision::Accepted(_) | Decision::Replayed(_) | Decision::Refused(_) => Ok(()),
    }
}

/// What the script says of one purchase.
pub(super) fn decision(
    reply: &mut Reply,
    purchase: &Purchase,
) -> Result<Result<Decision, EngineError>, EngineError> {
    let word = reply.bytes()?;
    let refusal = match &*word {
        b"accepted" | b"replayed" => {
            let order = reply
                .record(purchase.order)?
                .ok_or_else(|| reply.unexpected("record"))?;
            return Ok(Ok(if &*word == b"accepted" {
                Decision::Accepted(order)
            } else {
                Decision::Replayed(order)
            }));
        }
        b"damaged" => return Ok(Err(EngineError::Damaged(reply.text()?))),
        b"not_open" => {
            return Ok(Ok(Decision::Refused(Refusal::NotOpen {
                opens_at_ms: reply.number()?,
            })));
        }
        b"insufficient" => {
            return Ok(Ok(Decision::Refused(Refusal::Insufficient {
                remaining: reply.number()?,
            })));
        }
        b"order_limit" | b"buyer_limit" => {
            let facts: Bytes = reply.bytes()?;
            let (limit, held) = Unpack(&facts)
                .pair()
                .ok_or_else(|| reply.unexpected("limit"))?;
            return Ok(Ok(Decision::Refused(if &*word == b"order_limit" {
                Refusal::OrderLimit { limit, held }
            } else {
                Refusal::BuyerLimit { limit, held }
            })));
        }
        b"archived" => {
            return Ok(Ok(Decision::Refused(Refusal::Archived {
                rounds: reply.number()?,
            })));
        }
        b"mismatch" => Refusal::Mismatch,
        b"paused" => Refusal::Paused,
        b"closed" => Refusal::Closed,
        b"sold_out" => Refusal::SoldOut,
        b"left_out" => Refusal::LeftOut,
        other => return Err(reply.unexpected(&String::from_utf8_lossy(other))),
    };
    reply.bytes()?;
    Ok(Ok(Decision::Refused(refusal)))
}

impl Engine {
    /// Decides on a purchase.
    ///
    /// # Errors
    /// [`EngineError`] when there is no decision; [`EngineError::may_have_run`] says whether there
    /// may be an order nevertheless. The same purchase may be sent again at any time: it replays.
    pub async fn purchase(&self, purchase: Purchase) -> Result<Answer, EngineError> {
        let metrics = &self.shared.metrics;
        let answer = match self.refuse_from_memory(&purchase)? {
            Some(answer) => {
                metrics.refused_from_memory.inc();
                Ok(answer)
            }
            None => self.lane(&purchase)?.submit(purchase).await.flatten(),
        };
        match &answer {
            Ok(Answer {
                decision: Decision::Accepted(_),
                ..
            }) => metrics.accepted.inc(),
            Ok(Answer {
                decision: Decision::Replayed(_),
                ..
            }) => metrics.replayed.inc(),
            Ok(Answer {
                looked_up: true, ..
            }) => metrics.refused.inc(),
            Err(error) if error.may_have_run() => metrics.unknown.inc(),
            _ => 0,
        };
        answer
    }

    /// Decides on several purchases at once: all of them are accepted, or none. They must fit into
    /// one call, and have one durability. One answer for each, in their order: when one is refused,
    /// the others are [`Refusal::LeftOut`].
    ///
    /// # Errors
    /// [`EngineError`] when there is no decision. The same purchases may be sent again at any time.
    pub async fn purchase_together(
        &self,
        purchases: &[Purchase],
    ) -> Result<Vec<Answer>, EngineError> {
        let Some(first) = purchases.first() else {
            return Ok(Vec::new());
        };
        let mut room = Default::default();
        if !purchases
            .iter()
            .all(|purchase| PurchaseLane::fits(&mut room, purchase))
        {
            return Err(EngineError::Refused(
                "too many purchases at once".to_owned(),
            ));
        }
        // Who waits for replicas waits for all.
        let replicated = |purchase: &&Purchase| purchase.durability == Durability::Replicated;
        let lane = self.lane(purchases.iter().find(replicated).unwrap_or(first))?;
        let answers = lane.lane().decide(purchases, true).await?;
        answers.into_iter().collect()
    }

    /// Archived rounds of the round's sale as far as this node knows: whoever buys asks PostgreSQL
    /// for the order first when there are any.
    pub fn archived_rounds(&self, round: RoundId) -> u32 {
        self.shared.memory.archived_rounds(round)
    }

    /// Who waits for replicas keeps nobody waiting who does not.
    fn lane(&self, purchase: &Purchase) -> Result<&Arc<Coalescer<PurchaseLane>>, EngineError> {
        match (purchase.durability, &self.replicated) {
            (Durability::Fast | Durability::Fsync | Durability::Committed, _) => {
                Ok(&self.purchases)
            }
            (Durability::Replicated, Some(lane)) => Ok(lane),
            (Durability::Replicated, None) => {
                Err(EngineError::Refused("no replicas to wait for".to_owned()))
            }
        }
    }

    fn refuse_from_memory(&self, purchase: &Purchase) -> Result<Option<Answer>, EngineError> {
        let Shared { view, memory, .. } = &*self.shared;
        let epoch = view.epoch()?;
        let at = Instant::now();
        if memory.wants_proof(purchase.round, at) {
            self.load_proof(purchase.round);
        }
        let Some(now_ms) = view.tell_ms(at) else {
            return Ok(None);
        };
        let refusal = memory.refuse(purchase, epoch, at, now_ms);
        Ok(refusal.map(|refusal| Answer {
            decision: Decision::Refused(refusal),
            looked_up: false,
            now_ms,
        }))
    }
}
