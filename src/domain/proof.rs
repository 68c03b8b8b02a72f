//! Proofs of work: a challenge that a buyer's machine solves before it buys, without its human.
//!
//! A challenge is `v1.<expires_ms>.<bits>.<signature>`. A proof is `<challenge>.<nonce>`, with a nonce
//! (decimal, up to 64 bits) for which SHA-256 of the whole proof begins with `bits` zero bits.
//!
//! The signature is the first 16 bytes of HMAC-SHA256 over what stands before it and over what the
//! challenge is for: sale, buyer, purpose and `Idempotency-Key`. So nothing is kept of a challenge,
//! and yet it is good for one order only: with its own key it can only get the same order again, and
//! it says nothing of any other key.

use std::fmt;

use super::{
    id::{BuyerId, SaleId},
    limits::PROOF_LIFE_MS,
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

/// The form of challenges.
const FORM: &str = "v1";

/// Bytes of a signature: nobody guesses 128 bits within the life of a challenge, and a proof with a
/// nonce of ten digits still is one block of SHA-256, for solvers in browsers too.
const SIGNATURE_BYTES: usize = 16;

/// The longest proof, in bytes: form, instant of 13 digits, bits of 2, 22 of signature, nonce of 20,
/// four dots, and a few to spare.
const PROOF_BYTES_MAX: usize = 80;

/// What is bought with a proof. Each has orders of its own under a key, so each needs its own proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// An order.
    Order,
    /// The line of a cart.
    Checkout,
    /// A place in line, which may become an order.
    Waitlist,
}

impl Purpose {
    /// The word in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Order => "order",
            Self::Checkout => "checkout",
            Self::Waitlist => "waitlist",
        }
    }

    /// Reads the word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Order, Self::Checkout, Self::Waitlist]
            .into_iter()
            .find(|purpose| purpose.as_str() == word)
    }
}

/// What a challenge is for.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The sale that asks for it.
    pub sale: SaleId,
    /// Who buys.
    pub buyer: BuyerId,
    /// What is bought.
    pub purpose: Purpose,
    /// The `Idempotency-Key` that it will be bought with.
    pub key: &'a str,
}

/// Why a proof proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It has not the form of one.
    Unreadable,
    /// Its challenge was not given out for this sale, buyer, purpose and key.
    Foreign,
    /// Its challenge asks for less than the sale does by now.
    TooEasy,
    /// Its hash does not begin with so many zero bits.
    Unsolved,
    /// Its challenge is too old.
    Expired,
}

impl Fault {
    /// The word in the API.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unreadable => "unreadable",
            Self::Foreign => "foreign",
            Self::TooEasy => "too_easy",
            Self::Unsolved => "unsolved",
            Self::Expired => "expired",
        }
    }
}

/// Signs challenges, and knows its own.
#[derive(Clone)]
pub struct ProofKey(Hmac<Sha256>);

impl fmt::Debug for ProofKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProofKey([redacted])")
    }
}

impl ProofKey {
    /// A key of its own, derived from the server's secret: all nodes that share it know each other's
    /// challenges.
    ///
    /// # Errors
    /// Never for HMAC, which takes keys of any length.
    pub fn new(secret: &[u8]) -> Result<Self, hmac::digest::InvalidLength> {
        let mut key = Hmac::<Sha256>::new_from_slice(secret)?;
        key.update(b"stockade proof of work");
        let key = key.finalize().into_bytes();
        Ok(Self(Hmac::new_from_slice(&key)?))
    }

    /// A challenge to find so many zero bits, and when it expires, in milliseconds since the Unix
    /// epoch.
    pub fn challenge(&self, subject: &Subject<'_>, bits: u8, now_ms: i64) -> (String, i64) {
        let expires_ms = now_ms + PROOF_LIFE_MS;
        let mut text = format!("{FORM}.{expires_ms}.{bits}");
        let signature = self.sign(subject, &text).finalize().into_bytes();
        text.push('.');
        BASE64_URL_SAFE_NO_PAD.encode_string(&signature[..SIGNATURE_BYTES], &mut text);
        (text, expires_ms)
    }

    /// Whether a proof proves that at least `bits` bits of work were done for this. Costs two hashes,
    /// and the second one only for challenges of our own.
    ///
    /// # Errors
    /// The first [`Fault`]; [`Fault::Expired`] only if nothing else is wrong.
    pub fn verify(
        &self,
        subject: &Subject<'_>,
        bits: u8,
        proof: &str,
        now_ms: i64,
    ) -> Result<(), Fault> {
        if proof.len() > PROOF_BYTES_MAX {
            return Err(Fault::Unreadable);
        }
        let (challenge, nonce) = proof.rsplit_once('.').ok_or(Fault::Unreadable)?;
        let (signed, signature) = challenge.rsplit_once('.').ok_or(Fault::Unreadable)?;
        let (expires_ms, promised) = signed
            .strip_prefix(FORM)
            .and_then(|rest| rest.strip_prefix('.')?.split_once('.'))
            .ok_or(Fault::Unreadable)?;
        let expires_ms: i64 = expires_ms.parse().map_err(|_| Fault::Unreadable)?;
        let promised: u8 = promised.parse().map_err(|_| Fault::Unreadable)?;
        let digits = nonce.bytes().all(|byte| byte.is_ascii_digit());
        if !digits || nonce.parse::<u64>().is_err() {
            return Err(Fault::Unreadable);
        }
        let signature = BASE64_URL_SAFE_NO_PAD
            .decode(signature)
            .ok()
            .filter(|bytes| bytes.len() == SIGNATURE_BYTES)
            .ok_or(Fault::Unreadable)?;
        self.sign(subject, signed)
            .verify_truncated_left(&signature)
            .map_err(|_| Fault::Foreign)?;
        if promised < bits {
            Err(Fault::TooEasy)
        } else if zero_bits(&Sha256::digest(proof)) < u32::from(promised) {
            Err(Fault::Unsolved)
        } else if expires_ms <= now_ms {
            Err(Fault::Expired)
        } else {
            Ok(())
        }
    }

    fn sign(&self, subject: &Subject<'_>, text: &str) -> Hmac<Sha256> {
        let Subject {
            sale,
            buyer,
            purpose,
            key,
        } = subject;
        let mut mac = self.0.clone();
        mac.update(sale.0.as_bytes());
        mac.update(buyer.0.as_bytes());
        // Each behind its length, so that no two can run together into the same bytes.
        for part in [purpose.as_str(), key, text] {
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part.as_bytes());
        }
        mac
    }
}

/// Zero bits at the beginning.
fn zero_bits(hash: &[u8]) -> u32 {
    let whole = hash.iter().take_while(|byte| **byte == 0).count();
    let rest = hash.get(whole).map_or(0, |byte| byte.leading_zeros());
    u32::try_from(whole * 8).unwrap_or(u32::MAX) + rest
}

#[cfg(test)]
pub(super) mod tests {
    use uuid::Uuid;

    use super::*;

    const NOW_MS: i64 = 1_795_770_000_000;

    /// What a client does: one nonce after the other.
    pub(in super::super) fn solve(challenge: &str, bits: u32) -> String {
        let proofs = (0_u64..).map(|nonce| format!("{challenge}.{nonce}"));
        let mut solved = proofs.filter(|proof| zero_bits(&Sha256::digest(proof)) >= bits);
        solved.next().unwrap()
    }

    fn subject(key: &str) -> Subject<'_> {
        Subject {
            sale: SaleId(Uuid::from_u128(1)),
            buyer: BuyerId(Uuid::from_u128(2)),
            purpose: Purpose::Order,
            key,
        }
    }

    #[test]
    fn a_proof_is_good_for_what_its_challenge_was_for_and_nothing_else() {
        let key = ProofKey::new(b"secret").unwrap();
        let (challenge, expires_ms) = key.challenge(&subject("k"), 8, NOW_MS);
        let proof = solve(&challenge, 8);
        let verify = |subject: Subject<'_>, bits, at_ms| key.verify(&subject, bits, &proof, at_ms);
        // As often as it is sent, until it expires.
        for at_ms in [NOW_MS, NOW_MS, expires_ms - 1] {
            assert_eq!(verify(subject("k"), 8, at_ms), Ok(()));
        }
        assert_eq!(verify(subject("k"), 1, NOW_MS), Ok(()));
        assert_eq!(verify(subject("k"), 8, expires_ms), Err(Fault::Expired));
        assert_eq!(verify(subject("k"), 9, NOW_MS), Err(Fault::TooEasy));
        for other in [
            subject("l"),
            subject(""),
            Subject {
                sale: SaleId(Uuid::from_u128(2)),
                ..subject("k")
            },
            Subject {
                buyer: BuyerId(Uuid::from_u128(1)),
                ..subject("k")
            },
            Subject {
                purpose: Purpose::Waitlist,
                ..subject("k")
            },
        ] {
            assert_eq!(verify(other, 8, NOW_MS), Err(Fault::Foreign), "{other:?}");
        }
        let stranger = ProofKey::new(b"another secret").unwrap();
        let verified = stranger.verify(&subject("k"), 8, &proof, NOW_MS);
        assert_eq!(verified, Err(Fault::Foreign));
    }

    #[test]
    fn whatever_is_changed_of_a_proof_it_is_none_any_more() {
        let key = ProofKey::new(b"secret").unwrap();
        let (challenge, expires_ms) = key.challenge(&subject("k"), 12, NOW_MS);
        let proof = solve(&challenge, 12);
        let verify = |proof: &str| key.verify(&subject("k"), 12, proof, NOW_MS);
        assert_eq!(verify(&proof), Ok(()));
        for place in 0..proof.len() {
            for bit in 0..7 {
                let mut bytes = proof.clone().into_bytes();
                bytes[place] ^= 1 << bit;
                if let Ok(changed) = String::from_utf8(bytes) {
                    assert!(verify(&changed).is_err(), "{changed}");
                }
            }
            assert!(verify(&proof[..place]).is_err());
        }
        let (signed, signature) = challenge.rsplit_once('.').unwrap();
        let later = expires_ms + 1;
        for (bad, fault) in [
            (String::new(), Fault::Unreadable),
            (challenge.clone(), Fault::Unreadable),
            (format!("{challenge}."), Fault::Unreadable),
            (format!("{challenge}.+1"), Fault::Unreadable),
            (format!("{challenge}.x"), Fault::Unreadable),
            (
                format!("{challenge}.18446744073709551616"),
                Fault::Unreadable,
            ),
            (format!("{challenge}.{}", "0".repeat(60)), Fault::Unreadable),
            (format!("{signed}.{}.1", &signature[1..]), Fault::Unreadable),
            (format!("v2{}.1", &challenge[2..]), Fault::Unreadable),
            (format!("v1.{later}.12.{signature}.1"), Fault::Foreign),
            (format!("v1.{expires_ms}.1.{signature}.1"), Fault::Foreign),
            (
                format!("v1.{expires_ms}.256.{signature}.1"),
                Fault::Unreadable,
            ),
        ] {
            assert_eq!(verify(&bad), Err(fault), "{bad}");
        }
        let wrong = (0..).map(|nonce| format!("{challenge}.{nonce}"));
        let wrong = wrong.take(16).filter(|wrong| *wrong != proof);
        for wrong in wrong {
            assert_eq!(verify(&wrong), Err(Fault::Unsolved), "{wrong}");
        }
    }

    #[test]
    fn zero_bits_are_counted_from_the_front() {
        for (hash, bits) in [
            ([0xff, 0, 0], 0),
            ([0x7f, 0, 0], 1),
            ([0x01, 0, 0], 7),
            ([0, 0xff, 0], 8),
            ([0, 0x10, 0], 11),
            ([0, 0, 0], 24),
        ] {
            assert_eq!(zero_bits(&hash), bits, "{hash:?}");
        }
    }
}
