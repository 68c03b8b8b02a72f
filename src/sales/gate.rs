//! Who may be asked about at all: hurdles, decided on this node before anything is asked of Redis.

use std::sync::Arc;

use tokio::sync::Semaphore;
use uuid::Uuid;

use super::{SaleError, Shop};
use crate::{
    domain::{
        hurdles::{Candidate, Hurdle},
        id::{BuyerId, OrderId},
        proof::{ProofKey, Purpose, Subject},
    },
    engine::EngineError,
    faults,
    store::sales::SaleFacts,
};

/// Candidates who stopped at a hurdle and whose keys are looked up at the same time. A crowd without
/// proofs costs Redis no more than these, and a retry that needs one finds a place almost always.
const LOOKING_MAX: usize = 32;

/// Knows proofs of work, and how many it looks after. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Gate {
    key: ProofKey,
    looking: Arc<Semaphore>,
}

impl Gate {
    /// One that knows the challenges of this key.
    pub fn new(key: ProofKey) -> Self {
        Self {
            key,
            looking: Arc::new(Semaphore::new(LOOKING_MAX)),
        }
    }
}

/// Whose challenge it is.
fn owner(buyer: BuyerId) -> BuyerId {
    if faults::bug("proof_of_another_believed") {
        BuyerId(Uuid::nil())
    } else {
        buyer
    }
}

/// A challenge, and what it takes.
#[derive(Clone, Debug)]
pub struct Challenge {
    /// What is to be solved.
    pub text: String,
    /// How many zero bits are to be found; 0 if the sale asks for no proof.
    pub bits: u8,
    /// Until when a proof of it is good, milliseconds since the Unix epoch.
    pub expires_ms: i64,
    /// The clock that decides about it.
    pub now_ms: i64,
}

impl Shop {
    /// A challenge for what `subject` is about.
    ///
    /// # Errors
    /// [`SaleError`].
    pub async fn challenge(&self, subject: &Subject<'_>) -> Result<Challenge, SaleError> {
        let facts = self.facts(subject.sale).await?;
        let now_ms = self.now_ms(facts.partition);
        let bits = facts.hurdles.proof_of_work_bits.unwrap_or(0);
        let subject = Subject {
            buyer: owner(subject.buyer),
            ..*subject
        };
        let (text, expires_ms) = self.gate.key.challenge(&subject, bits, now_ms);
        Ok(Challenge {
            text,
            bits,
            expires_ms,
            now_ms,
        })
    }

    /// What stops `candidate` from buying of this sale with this key.
    pub(super) fn stops(
        &self,
        facts: &SaleFacts,
        candidate: &Candidate<'_>,
        purpose: Purpose,
        key: &str,
    ) -> Option<Hurdle> {
        let subject = Subject {
            sale: facts.id,
            buyer: owner(candidate.buyer),
            purpose,
            key,
        };
        let now_ms = self.now_ms(facts.partition);
        facts
            .hurdles
            .stops(candidate, &subject, &self.gate.key, now_ms)
    }

    /// Lets those in who are stopped by `hurdle`, but whose key has its order already: whatever is
    /// asked of buyers by now, and however old the proof is, an acceptance is told again.
    ///
    /// # Errors
    /// [`SaleError::Hurdle`], or why it is not known whether there is the order.
    pub(super) async fn admit_known(
        &self,
        facts: &SaleFacts,
        order: OrderId,
        hurdle: Hurdle,
    ) -> Result<(), SaleError> {
        let stopped = SaleError::Hurdle(facts.id, hurdle);
        let Ok(_looking) = self.gate.looking.try_acquire() else {
            return Err(match hurdle {
                // Whoever sends a proof with the same key is told of the order then.
                Hurdle::Proof { .. } => stopped,
                // Nothing that the client could do would help: nobody knows whether it has one.
                Hurdle::TooYoung { .. } => EngineError::Overloaded(LOOKING_MAX).into(),
            });
        };
        let engine = self.engine(facts.partition)?;
        if engine.order(order).await?.is_some() {
            return Ok(());
        }
        let rounds = engine.archived_rounds(facts.round_id());
        let archived = rounds > 0 && self.archive.rounds_without(order, rounds).is_none();
        if archived && self.orders.by_id(order).await?.is_some() {
            return Ok(());
        }
        Err(stopped)
    }
}
