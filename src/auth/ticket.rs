//! Tickets: what opens a stream for whoever cannot send a header, once and soon.

use std::{fmt, sync::Arc, time::Duration};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use rand::{TryRngCore, rngs::OsRng};
use sha2::Sha256;
use uuid::Uuid;

use super::{Role, barred::Barred, token::Identity};
use crate::{engine::Cache, faults};

/// How long a ticket waits to be used. By the clock of the cache Redis, which all nodes share.
pub const LIFETIME: Duration = Duration::from_secs(30);

const NONCE_BYTES: usize = 16;
const ID_BYTES: usize = 16;
/// What is signed: nonce, user, session. A nil session is none.
const CLAIM_BYTES: usize = NONCE_BYTES + 2 * ID_BYTES;
const MAC_BYTES: usize = 32;

/// Why a ticket is not given, or opens nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Not one of ours, used, too old, or of a session that has ended. There is one such answer.
    #[error("not a ticket to believe")]
    Invalid,
    /// The store that knows which tickets are unused does not answer.
    #[error("it is not known which tickets are unused")]
    Unavailable,
}

/// Gives tickets and takes them.
///
/// A ticket says whose it is, signed, so that what is made up costs no question. That it is unused is
/// a key of its own in the cache Redis, which is there from the beginning and is marked by whoever
/// uses it: only one finds it unmarked. What is lost there is a ticket that opens nothing, never one
/// that opens twice.
#[derive(Clone)]
pub struct Tickets {
    mac: Hmac<Sha256>,
    unused: Cache,
    barred: Arc<Barred>,
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tickets")
    }
}

impl Tickets {
    /// Tickets under `secret`: without it nobody can make one.
    ///
    /// # Errors
    /// Never for a secret of any length; the library's signature says otherwise.
    pub fn new(
        secret: &[u8],
        unused: Cache,
        barred: Arc<Barred>,
    ) -> Result<Self, hmac::digest::InvalidLength> {
        let mut mac = Hmac::new_from_slice(secret)?;
        // The secret also signs access tokens; what it makes here is of another kind.
        mac.update(b"stream ticket");
        Ok(Self {
            mac,
            unused,
            barred,
        })
    }

    /// A ticket for whoever has shown a token.
    ///
    /// # Errors
    /// [`TicketError::Unavailable`].
    pub async fn issue(&self, identity: &Identity) -> Result<String, TicketError> {
        let mut nonce = [0; NONCE_BYTES];
        OsRng
            .try_fill_bytes(&mut nonce)
            .map_err(|_| TicketError::Unavailable)?;
        let session = identity.session.unwrap_or_default();
        let mut bytes = Vec::with_capacity(CLAIM_BYTES + MAC_BYTES);
        bytes.extend_from_slice(&nonce);
        bytes.extend_from_slice(identity.user.as_bytes());
        bytes.extend_from_slice(session.as_bytes());
        let mut mac = self.mac.clone();
        mac.update(&bytes);
        bytes.extend_from_slice(&mac.finalize().into_bytes());
        if self.unused.offer(&key(&nonce), LIFETIME).await {
            Ok(BASE64_URL_SAFE_NO_PAD.encode(bytes))
        } else {
            Err(TicketError::Unavailable)
        }
    }

    /// Uses a ticket up: who got it, as a buyer, whatever else the token allowed.
    ///
    /// # Errors
    /// [`TicketError`].
    pub async fn redeem(&self, text: &str) -> Result<Identity, TicketError> {
        let (nonce, identity) = self.read(text).ok_or(TicketError::Invalid)?;
        if self.barred.bars(&identity) {
            return Err(TicketError::Invalid);
        }
        match self.unused.take(&key(&nonce)).await {
            Some(true) => Ok(identity),
            Some(false) if faults::bug("ticket_used_twice") => Ok(identity),
            Some(false) => Err(TicketError::Invalid),
            None => Err(TicketError::Unavailable),
        }
    }

    /// What a ticket says, if it is one of ours.
    fn read(&self, text: &str) -> Option<([u8; NONCE_BYTES], Identity)> {
        // Whatever is longer is none, and is not even decoded.
        if text.len() > 2 * (CLAIM_BYTES + MAC_BYTES) {
            return None;
        }
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
        let (claim, signature) = bytes.split_at_checked(CLAIM_BYTES)?;
        let mut mac = self.mac.clone();
        mac.update(claim);
        mac.verify_slice(signature).ok()?;
        let (nonce, ids) = claim.split_first_chunk()?;
        let (user, session) = ids.split_at_checked(ID_BYTES)?;
        let session = Uuid::from_slice(session).ok()?;
        let identity = Identity {
            user: Uuid::from_slice(user).ok()?,
            role: Role::Buyer,
            session: (!session.is_nil()).then_some(session),
            registered_at: None,
        };
        Some((*nonce, identity))
    }
}

/// Where it stands that a ticket is unused. The ticket does not follow from it.
fn key(nonce: &[u8; NONCE_BYTES]) -> String {
    format!("stockade:ticket:{}", Uuid::from_bytes(*nonce).simple())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        metrics::IdentityMetrics,
        store::{Database, DatabaseSettings, sessions::Sessions},
    };

    fn tickets(secret: &[u8]) -> Tickets {
        let url = "postgres://nobody@127.0.0.1:9/none";
        let database = Database::new(url, DatabaseSettings::default()).unwrap();
        let barred = Barred::new(Sessions::new(database), IdentityMetrics::default());
        Tickets::new(secret, Cache::default(), Arc::new(barred)).unwrap()
    }

    fn signed(tickets: &Tickets, claim: &[u8]) -> String {
        let mut mac = tickets.mac.clone();
        mac.update(claim);
        let signature = mac.finalize().into_bytes();
        BASE64_URL_SAFE_NO_PAD.encode([claim, &signature].concat())
    }

    #[tokio::test]
    async fn only_what_is_signed_here_is_a_ticket_and_without_the_cache_there_is_none() {
        let (ours, others) = (tickets(b"one"), tickets(b"two"));
        let claim: Vec<u8> = (1..=48).collect();
        let good = signed(&ours, &claim);
        let (nonce, identity) = ours.read(&good).unwrap();
        assert_eq!(nonce[..], claim[..16]);
        assert_eq!(identity.user.as_bytes()[..], claim[16..32]);
        assert_eq!(identity.session.unwrap().as_bytes()[..], claim[32..]);
        assert_eq!(identity.role, Role::Buyer);
        let nobody = [&claim[..32], &[0; 16]].concat();
        let (_, identity) = ours.read(&signed(&ours, &nobody)).unwrap();
        assert_eq!(identity.session, None);

        // Good ones, but who knows whether they are unused?
        assert_eq!(ours.redeem(&good).await, Err(TicketError::Unavailable));
        assert_eq!(ours.issue(&identity).await, Err(TicketError::Unavailable));
        let mut bad: Vec<String> = ["", "x", "a.b.c", &good[1..], &good[..64]]
            .map(str::to_owned)
            .into();
        bad.extend([format!("{good}="), format!("{good}AA"), good.repeat(4)]);
        bad.push(signed(&others, &claim));
        bad.push(signed(&ours, &claim[1..]));
        bad.push(signed(&ours, &[&claim[..], &[0]].concat()));
        for at in 0..CLAIM_BYTES + MAC_BYTES {
            let mut bytes = BASE64_URL_SAFE_NO_PAD.decode(&good).unwrap();
            bytes[at] ^= 1;
            bad.push(BASE64_URL_SAFE_NO_PAD.encode(bytes));
        }
        for text in bad {
            assert_eq!(
                ours.redeem(&text).await,
                Err(TicketError::Invalid),
                "{text}"
            );
        }
    }
}
