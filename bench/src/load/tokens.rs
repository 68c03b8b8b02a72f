//! Access tokens, signed with the server's secret, so that ten thousand buyers do not cost ten
//! thousand password hashes.

use std::num::NonZero;
use std::thread;

use anyhow::{Result, anyhow};
use chrono::{DateTime, TimeDelta, Utc};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde::Serialize;
use uuid::Uuid;

/// Longer than any run may take.
const LIFETIME: TimeDelta = TimeDelta::hours(4);

/// The bearer's rights.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    Buyer,
    Operator,
}

#[derive(Serialize)]
struct Claims {
    iss: &'static str,
    aud: &'static str,
    sub: Uuid,
    role: Role,
    iat: i64,
    exp: i64,
    jti: Uuid,
}

/// Signs as the server would.
pub(crate) struct Signer {
    key: EncodingKey,
    header: Header,
    issued_at: DateTime<Utc>,
}

impl Signer {
    /// A signer with the server's secret.
    pub(crate) fn new(secret: &str, issued_at: DateTime<Utc>) -> Self {
        let mut header = Header::new(Algorithm::HS256);
        header.typ = Some("at+jwt".to_owned());
        Self {
            key: EncodingKey::from_secret(secret.as_bytes()),
            header,
            issued_at,
        }
    }

    /// The `Authorization` header of one user.
    pub(crate) fn bearer(&self, sub: Uuid, role: Role) -> Result<String> {
        let claims = Claims {
            iss: "stockade",
            aud: "stockade",
            sub,
            role,
            iat: self.issued_at.timestamp(),
            exp: (self.issued_at + LIFETIME).timestamp(),
            // Unique because a run signs one token per user.
            jti: sub,
        };
        let token = encode(&self.header, &claims, &self.key)?;
        Ok(format!("Bearer {token}"))
    }

    /// The `Authorization` headers of many buyers, signed on all cores.
    pub(crate) fn buyers(&self, ids: &[Uuid]) -> Result<Vec<String>> {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let share = ids.len().div_ceil(cores).max(1);
        thread::scope(|scope| {
            let signers: Vec<_> = ids
                .chunks(share)
                .map(|ids| {
                    scope.spawn(move || {
                        ids.iter()
                            .map(|id| self.bearer(*id, Role::Buyer))
                            .collect::<Result<Vec<_>>>()
                    })
                })
                .collect();
            let mut bearers = Vec::with_capacity(ids.len());
            for signer in signers {
                bearers.extend(signer.join().map_err(|_| anyhow!("a signer died"))??);
            }
            Ok(bearers)
        })
    }
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{DecodingKey, Validation, decode};
    use serde_json::Value;

    use super::*;

    #[test]
    fn a_token_holds_what_the_server_checks() {
        let secret = "0123456789abcdef0123456789abcdef";
        let ids: Vec<Uuid> = (1..=5).map(Uuid::from_u128).collect();
        let bearers = Signer::new(secret, crate::clock::now())
            .buyers(&ids)
            .unwrap();
        assert_eq!(bearers.len(), 5);
        let mut rules = Validation::new(Algorithm::HS256);
        rules.set_issuer(&["stockade"]);
        rules.set_audience(&["stockade"]);
        rules.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        for (bearer, id) in bearers.iter().zip(&ids) {
            let token = bearer.strip_prefix("Bearer ").unwrap();
            let read = decode::<Value>(token, &DecodingKey::from_secret(secret.as_bytes()), &rules)
                .unwrap();
            assert_eq!(read.header.typ.as_deref(), Some("at+jwt"));
            assert_eq!(read.claims["sub"], id.to_string());
            assert_eq!(read.claims["role"], "buyer");
            assert!(read.claims["iat"].is_i64() && read.claims["jti"].is_string());
        }
    }
}
