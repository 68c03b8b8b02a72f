//! Hurdles: challenges for proofs of work, the proofs that come back, and how whoever stops is told.

use std::{sync::Arc, time::Duration};

use axum::{
    extract::{FromRequestParts, State},
    http::{HeaderName, HeaderValue, request},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;
use uuid::Uuid;

use super::{
    body::{Json, Path},
    caller::Caller,
    check::{Check, Timestamp},
    idempotency::IdempotencyKey,
    problem::{Code, Problem},
    routes::{Access, Routes},
};
use crate::{
    auth::token::Identity,
    domain::{
        hurdles::{Candidate, Hurdle},
        id::{BuyerId, SaleId},
        proof::{Fault, Purpose, Subject},
    },
    sales::Shop,
};

/// The header that carries proofs of work.
pub(super) const PROOF_OF_WORK: HeaderName = HeaderName::from_static("proof-of-work");

pub(super) fn routes() -> Routes {
    Routes::new().add(
        Access::Caller,
        routes!(challenge),
        &[Code::NotFound, Code::IdempotencyKeyMissing],
    )
}

/// The proofs of work that a request brings along, unread: most sales ask for none.
#[derive(Clone, Debug)]
pub(super) struct Proofs(Option<HeaderValue>);

impl Proofs {
    /// Who asks, with these proofs.
    pub(super) fn of(&self, caller: &Identity) -> Candidate<'_> {
        Candidate {
            buyer: BuyerId(caller.user),
            registered_at: caller.registered_at,
            // What is no text is no proof either.
            proofs: self.0.as_ref().map(|value| value.to_str().unwrap_or("")),
        }
    }
}

impl<S: Sync> FromRequestParts<S> for Proofs {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut request::Parts, _: &S) -> Result<Self, Problem> {
        let mut values = parts.headers.get_all(PROOF_OF_WORK).iter();
        let first = values.next().cloned();
        if values.next().is_some() {
            let detail = "there is more than one: separate proofs by commas";
            return Err(Problem::unreadable("#/headers/proof-of-work", detail));
        }
        Ok(Self(first))
    }
}

/// What a proof of work shall be for.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ChallengeRequest {
    /// What will be asked for with it: an `order`, the `checkout` of a cart that has this sale in it,
    /// or a place on the `waitlist`.
    #[schema(pattern = "^(order|checkout|waitlist)$", example = "order")]
    purpose: String,
}

/// A challenge.
#[derive(Serialize, ToSchema)]
struct ChallengeView {
    /// What is to be solved: find a whole number from 0 to 2^64 - 1, so that SHA-256 of this text, a
    /// dot, and the number in decimal begins with `bits` zero bits. All of that text is the proof.
    #[schema(example = "v1.1795770120000.16.u0nA2cXWc3mAnVYl2CZzNg")]
    challenge: String,
    /// Zero bits to find: each more doubles the work. 0 if the sale asks for no proof.
    bits: u8,
    /// Until when the proof can be used.
    expires_at: Timestamp,
    /// The clock that decides about it, in milliseconds since the Unix epoch.
    server_time_ms: i64,
}

/// Get a challenge
///
/// For a sale with `proof_of_work_bits`. Its solution is good for this user, this sale, this purpose
/// and this `Idempotency-Key`: send it with the purchase, as the header `Proof-Of-Work`. Asking again
/// gives another one, for nothing.
#[utoipa::path(post, path = "/v1/sales/{id}/challenge", tag = "orders", request_body = ChallengeRequest,
    params(("id" = Uuid, Path), ("Idempotency-Key" = String, Header, description = "The key that the purchase will have: 1 to 255 visible ASCII characters")),
    responses((status = 200, description = "The challenge", body = ChallengeView)))]
async fn challenge(
    Caller(caller): Caller,
    State(shop): State<Arc<Shop>>,
    Path(sale): Path<Uuid>,
    key: IdempotencyKey,
    Json(request): Json<ChallengeRequest>,
) -> Result<axum::Json<ChallengeView>, Problem> {
    let mut check = Check::new();
    let purpose = Purpose::parse(&request.purpose);
    if purpose.is_none() {
        check.refuse("#/purpose", "must be order, checkout or waitlist");
    }
    let subject = Subject {
        sale: SaleId(sale),
        buyer: BuyerId(caller.user),
        purpose: check.done_with(purpose)?,
        key: &key.0,
    };
    let challenge = shop.challenge(&subject).await?;
    Ok(axum::Json(ChallengeView {
        challenge: challenge.text,
        bits: challenge.bits,
        expires_at: Timestamp::from_ms(challenge.expires_ms),
        server_time_ms: challenge.now_ms,
    }))
}

/// Tells what is in somebody's way.
pub(super) fn stopped(sale: SaleId, hurdle: Hurdle) -> Problem {
    match hurdle {
        Hurdle::TooYoung {
            min_account_age_seconds,
            old_enough_at_ms,
            now_ms,
        } => {
            let detail = match old_enough_at_ms {
                Some(_) => "The account is too young for this sale.",
                None => "Nothing here says how old the account is, and this sale asks for it.",
            };
            let problem = Problem::new(Code::AccountTooYoung, detail)
                .fact("min_account_age_seconds", min_account_age_seconds);
            match old_enough_at_ms {
                Some(at_ms) => {
                    let wait = u64::try_from(at_ms.saturating_sub(now_ms)).unwrap_or(0);
                    problem
                        .after(Duration::from_millis(wait))
                        .fact("old_enough_at", Timestamp::from_ms(at_ms).to_string())
                }
                None => problem,
            }
        }
        Hurdle::Proof { bits, fault } => {
            let problem = match fault {
                None => {
                    let detail = "This sale asks for a proof of work, and there is none.";
                    Problem::new(Code::ProofRequired, detail)
                }
                Some(fault) => {
                    let detail = match fault {
                        Fault::Unreadable => "The proof of work has not the form of one.",
                        Fault::Foreign => {
                            "The proof of work is not for this sale, user, purpose and key."
                        }
                        Fault::TooEasy => "The sale asks for more work by now.",
                        Fault::Unsolved => "The proof of work does not solve its challenge.",
                        Fault::Expired => "The proof of work has expired.",
                    };
                    Problem::new(Code::ProofInvalid, detail).fact("reason", fault.as_str())
                }
            };
            problem
                .fact("bits", bits)
                .fact("challenge", format!("/v1/sales/{sale}/challenge"))
        }
    }
}
