//! Hurdles: what a sale asks of whoever buys, so that bots have it less easy. Nodes decide on them
//! before anything is asked of Redis, from what the request brings along.

use super::{
    cart::LINES_MAX,
    id::BuyerId,
    proof::{Fault, ProofKey, Subject},
};

/// What a sale asks; usually nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hurdles {
    /// How old the buyer's account must be, in seconds, 1 … [`ACCOUNT_AGE_SECONDS_MAX`].
    ///
    /// [`ACCOUNT_AGE_SECONDS_MAX`]: super::limits::ACCOUNT_AGE_SECONDS_MAX
    pub min_account_age_seconds: Option<u32>,
    /// How much work each order takes, in bits, 1 … [`PROOF_BITS_MAX`].
    ///
    /// [`PROOF_BITS_MAX`]: super::limits::PROOF_BITS_MAX
    pub proof_of_work_bits: Option<u8>,
}

/// Whoever wants to buy, and what there is to say for them.
#[derive(Clone, Copy, Debug)]
pub struct Candidate<'a> {
    /// Who it is.
    pub buyer: BuyerId,
    /// When the account was made, in seconds since the Unix epoch; `None` when the credential does
    /// not say.
    pub registered_at: Option<i64>,
    /// Proofs of work, separated by commas.
    pub proofs: Option<&'a str>,
}

impl From<BuyerId> for Candidate<'_> {
    fn from(buyer: BuyerId) -> Self {
        Self {
            buyer,
            registered_at: None,
            proofs: None,
        }
    }
}

/// What is in a candidate's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hurdle {
    /// The account is too young, or nobody knows its age.
    TooYoung {
        /// How old it must be.
        min_account_age_seconds: u32,
        /// When it will be, milliseconds since the Unix epoch.
        old_enough_at_ms: Option<i64>,
        /// What time it is.
        now_ms: i64,
    },
    /// There is no proof of work, or one that proves nothing.
    Proof {
        /// How much it takes.
        bits: u8,
        /// What is wrong with the one that there is.
        fault: Option<Fault>,
    },
}

impl Hurdles {
    /// Whether there are any.
    pub fn any(&self) -> bool {
        self.min_account_age_seconds.is_some() || self.proof_of_work_bits.is_some()
    }

    /// The first hurdle that `candidate` does not clear.
    pub fn stops(
        &self,
        candidate: &Candidate<'_>,
        subject: &Subject<'_>,
        key: &ProofKey,
        now_ms: i64,
    ) -> Option<Hurdle> {
        if let Some(min_account_age_seconds) = self.min_account_age_seconds {
            let wait_ms = i64::from(min_account_age_seconds) * 1_000;
            let old_enough_at_ms = candidate
                .registered_at
                .map(|at| at.saturating_mul(1_000).saturating_add(wait_ms));
            if old_enough_at_ms.is_none_or(|at| now_ms < at) {
                return Some(Hurdle::TooYoung {
                    min_account_age_seconds,
                    old_enough_at_ms,
                    now_ms,
                });
            }
        }
        let bits = self.proof_of_work_bits?;
        let mut fault = None;
        let proofs = candidate
            .proofs
            .into_iter()
            .flat_map(|list| list.split(','));
        for proof in proofs.take(LINES_MAX) {
            match key.verify(subject, bits, proof.trim_matches([' ', '\t']), now_ms) {
                Ok(()) => return None,
                // Those of other lines of a cart are no mistake.
                Err(Fault::Foreign) => fault = fault.or(Some(Fault::Foreign)),
                Err(other) => fault = fault.filter(|it| *it != Fault::Foreign).or(Some(other)),
            }
        }
        Some(Hurdle::Proof { bits, fault })
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::{
        super::{
            id::SaleId,
            proof::{Purpose, tests::solve},
        },
        *,
    };

    const NOW_MS: i64 = 1_795_770_000_000;
    const BUYER: BuyerId = BuyerId(Uuid::from_u128(2));

    fn key() -> ProofKey {
        ProofKey::new(b"secret").unwrap()
    }

    fn subject(sale: u128) -> Subject<'static> {
        Subject {
            sale: SaleId(Uuid::from_u128(sale)),
            buyer: BUYER,
            purpose: Purpose::Checkout,
            key: "k",
        }
    }

    #[test]
    fn an_account_is_old_enough_from_the_very_second_on() {
        let hurdles = Hurdles {
            min_account_age_seconds: Some(3_600),
            ..Hurdles::default()
        };
        let now = NOW_MS / 1_000;
        for (registered_at, old_enough_at_ms) in [
            (Some(now - 3_600), None),
            (Some(i64::MIN), None),
            (Some(now - 3_599), Some(Some(NOW_MS + 1_000))),
            (Some(now), Some(Some(NOW_MS + 3_600_000))),
            // Whoever signs tokens with such a time gets what it says.
            (Some(i64::MAX), Some(Some(i64::MAX))),
            (None, Some(None)),
        ] {
            let candidate = Candidate {
                registered_at,
                ..BUYER.into()
            };
            let stopped = hurdles.stops(&candidate, &subject(1), &key(), NOW_MS);
            let expected = old_enough_at_ms.map(|old_enough_at_ms| Hurdle::TooYoung {
                min_account_age_seconds: 3_600,
                old_enough_at_ms,
                now_ms: NOW_MS,
            });
            assert_eq!(stopped, expected, "{registered_at:?}");
        }
    }

    #[test]
    fn one_of_several_proofs_is_enough_and_the_most_telling_fault_is_told() {
        let hurdles = Hurdles {
            proof_of_work_bits: Some(4),
            ..Hurdles::default()
        };
        let proof = |sale, at_ms| {
            let (challenge, _) = key().challenge(&subject(sale), 4, at_ms);
            solve(&challenge, 4)
        };
        let (right, other) = (proof(1, NOW_MS), proof(2, NOW_MS));
        let old = proof(1, 0);
        let many = vec![other.as_str(); LINES_MAX].join(",");
        for (proofs, expected) in [
            (Some(right.clone()), None),
            (Some(format!("{other}, {right}")), None),
            (Some(format!("x,{old},{right}")), None),
            (None, Some(None)),
            (Some(String::new()), Some(Some(Fault::Unreadable))),
            (Some(other.clone()), Some(Some(Fault::Foreign))),
            (Some(format!("{other},{old}")), Some(Some(Fault::Expired))),
            (Some(format!("{old},{other}")), Some(Some(Fault::Expired))),
            // What nobody needs is not looked at.
            (Some(format!("{many},{right}")), Some(Some(Fault::Foreign))),
        ] {
            let candidate = Candidate {
                proofs: proofs.as_deref(),
                ..BUYER.into()
            };
            let stopped = hurdles.stops(&candidate, &subject(1), &key(), NOW_MS);
            let expected = expected.map(|fault| Hurdle::Proof { bits: 4, fault });
            assert_eq!(stopped, expected, "{proofs:?}");
        }
    }

    #[test]
    fn nothing_stops_anybody_if_nothing_is_asked() {
        let none = Hurdles::default();
        assert!(!none.any());
        assert_eq!(none.stops(&BUYER.into(), &subject(1), &key(), NOW_MS), None);
    }
}
