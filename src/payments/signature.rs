//! Stripe's scheme of signed webhooks, which the sandbox uses, too: `t=<seconds>,v1=<hex>[,v1=…]`,
//! each `v1` the HMAC-SHA256 of `<seconds>.<body>`.

use std::fmt::Write;

use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretString};
use sha2::Sha256;

use crate::faults;

/// How far the time of a signature may be from ours, in seconds: older ones may be replays, newer
/// ones are not from a clock to believe.
pub const SIGNATURE_TOLERANCE_SECONDS: i64 = 300;

/// Signatures in one header: two during a change of secrets. More are not looked at.
const SIGNATURES_MAX: usize = 8;

/// Why a signature is not one to believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// There is none, or it cannot be read.
    #[error("the signature is missing or cannot be read")]
    Missing,
    /// None of them is one of ours.
    #[error("the signature is not right")]
    Wrong,
    /// Too far from now.
    #[error("the signature is too old or from the future")]
    Stale,
}

/// Verifies a signature of `body`. `now` in seconds since the Unix epoch.
///
/// # Errors
/// [`Invalid`].
pub fn verify(
    secrets: &[SecretString],
    header: &str,
    body: &[u8],
    now: i64,
) -> Result<(), Invalid> {
    let mut time = None;
    let mut signatures = Vec::new();
    for part in header.split(',') {
        match part.trim().split_once('=') {
            Some(("t", seconds)) if time.is_none() => {
                // The digits are what is signed.
                let plain = seconds.bytes().all(|byte| byte.is_ascii_digit());
                let parsed = seconds.parse::<i64>().ok().filter(|_| plain);
                time = Some((seconds, parsed.ok_or(Invalid::Missing)?));
            }
            Some(("t", _)) => return Err(Invalid::Missing),
            Some(("v1", digits)) if signatures.len() < SIGNATURES_MAX => {
                signatures.extend(bytes(digits));
            }
            // Other schemes, `v0` among them, prove nothing.
            _ => {}
        }
    }
    let (digits, time) = time.ok_or(Invalid::Missing)?;
    if signatures.is_empty() {
        return Err(Invalid::Missing);
    }
    let right = secrets.iter().any(|secret| {
        signatures.iter().any(|signature| {
            // In constant time.
            mac(secret, digits, body).is_some_and(|mac| mac.verify_slice(signature).is_ok())
        })
    });
    if !right && !faults::bug("signature_unchecked") {
        return Err(Invalid::Wrong);
    }
    // Whoever signed it is known by now.
    if now.abs_diff(time) > SIGNATURE_TOLERANCE_SECONDS.unsigned_abs() {
        return Err(Invalid::Stale);
    }
    Ok(())
}

/// The header that says that `body` was signed at `now`, in seconds since the Unix epoch.
pub fn sign(secret: &SecretString, body: &[u8], now: i64) -> String {
    let digits = now.to_string();
    let mut header = format!("t={digits},v1=");
    if let Some(mac) = mac(secret, &digits, body) {
        for byte in mac.finalize().into_bytes() {
            // Writing into a string cannot fail.
            let _ = write!(header, "{byte:02x}");
        }
    }
    header
}

fn mac(secret: &SecretString, time: &str, body: &[u8]) -> Option<Hmac<Sha256>> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose_secret().as_bytes()).ok()?;
    mac.update(time.as_bytes());
    mac.update(b".");
    mac.update(body);
    Some(mac)
}

/// The 32 bytes of 64 hexadecimal digits.
fn bytes(digits: &str) -> Option<[u8; 32]> {
    let digits = digits.as_bytes();
    let mut bytes = [0; 32];
    if digits.len() != 2 * bytes.len() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        let value = digit(pair[0])? * 16 + digit(pair[1])?;
        *byte = u8::try_from(value).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: i64 = 1_492_774_577;

    fn secret() -> Vec<SecretString> {
        vec!["whsec_test_secret".into()]
    }

    // Built as the documentation says, step by step, with another implementation:
    // printf '%s.%s' "$t" "$body" | openssl dgst -sha256 -hmac "$secret"
    const VECTORS: &[(&str, &str, &str, &str)] = &[
        (
            "whsec_test_secret",
            "1492774577",
            "{\"id\":\"evt_1\",\"object\":\"event\"}",
            "654b43d3508ecadb3f8cefc4bc7d3d2bdc5ba9e03bf2c89b2d0657a8e24e4543",
        ),
        (
            "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            "1614265330",
            "{\"test\": 2432232314}",
            "2e37df5d4a028c51a7f3133d64ae1e300d2c2c900f1b1d49d4369ad2530f8964",
        ),
        (
            "s",
            "1700000000",
            "",
            "b24b50ecc2eed7dcb199629e32fdcd28a813bca432fe1c8ce9e5341dd6d48743",
        ),
        (
            "whsec_with_ünicode",
            "1764000000",
            "{\n  \"id\": \"evt_1NG8Du2eZvKYlo2CUI79vXWy\",\n  \"type\": \"payment_intent.succeeded\",\n  \"amount\": \"1999 €\"\n}",
            "dc14620eabc83df340442d0c95cd0e596f1edbff96286bee4791dc2fcd933fba",
        ),
    ];

    #[test]
    fn vectors_of_the_documented_scheme_are_right() {
        for (secret, time, body, signature) in VECTORS {
            let secrets = [SecretString::from(*secret)];
            let now = time.parse().unwrap();
            let v0 = "v0=6ffbb59b2300aae63f272406069a9788598b792a944a07aba816edb039989a39";
            for header in [
                format!("t={time},v1={signature}"),
                format!("t={time},v1={signature},{v0}"),
                // While a secret is changed there are two.
                format!("t={time},v1={},v1={signature}", "0".repeat(64)),
                format!("v1={signature}, t={time}"),
            ] {
                assert_eq!(
                    verify(&secrets, &header, body.as_bytes(), now),
                    Ok(()),
                    "{header}"
                );
            }
            assert_eq!(
                sign(&secrets[0], body.as_bytes(), now),
                format!("t={time},v1={signature}")
            );
        }
    }

    #[test]
    fn old_and_future_ones_are_refused() {
        let header = sign(&secret()[0], b"{}", NOW);
        for (now, expected) in [
            (NOW + 300, Ok(())),
            (NOW - 300, Ok(())),
            (NOW + 301, Err(Invalid::Stale)),
            (NOW - 301, Err(Invalid::Stale)),
            (i64::MAX, Err(Invalid::Stale)),
            (i64::MIN, Err(Invalid::Stale)),
        ] {
            assert_eq!(verify(&secret(), &header, b"{}", now), expected, "{now}");
        }
    }

    #[test]
    fn what_is_no_signature_is_refused() {
        let good = sign(&secret()[0], b"{}", NOW);
        let digits = good.rsplit_once('=').unwrap().1;
        for bad in [
            String::new(),
            "t=".to_owned(),
            format!("t={NOW}"),
            format!("v1={digits}"),
            format!("t={NOW},v0={digits}"),
            format!("t={NOW},v1="),
            format!("t={NOW},v1={}", &digits[1..]),
            format!("t={NOW},v1={digits}0"),
            format!("t=+{NOW},v1={digits}"),
            format!("t={NOW},t={NOW},v1={digits}"),
            format!("t={NOW}é,v1={digits}"),
            format!("t=99999999999999999999,v1={digits}"),
        ] {
            let refused = verify(&secret(), &bad, b"{}", NOW);
            assert!(
                matches!(refused, Err(Invalid::Missing)),
                "{bad}: {refused:?}"
            );
        }
        let moved = format!("t={},v1={digits}", NOW + 1);
        assert_eq!(verify(&secret(), &moved, b"{}", NOW), Err(Invalid::Wrong));
        assert_eq!(
            verify(&["other".into()], &good, b"{}", NOW),
            Err(Invalid::Wrong)
        );
        assert_eq!(verify(&[], &good, b"{}", NOW), Err(Invalid::Wrong));
        // Any of several secrets will do.
        let both = ["other".into(), secret().remove(0)];
        assert_eq!(verify(&both, &good, b"{}", NOW), Ok(()));
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_refused(
            body in proptest::collection::vec(any::<u8>(), 1..200),
            place in any::<proptest::sample::Index>(),
            change in 1_u8..,
        ) {
            let header = sign(&secret()[0], &body, NOW);
            prop_assert_eq!(verify(&secret(), &header, &body, NOW), Ok(()));
            let mut other = body.clone();
            let at = place.index(other.len());
            other[at] ^= change;
            prop_assert_eq!(verify(&secret(), &header, &other, NOW), Err(Invalid::Wrong));
            let mut cut = body.clone();
            cut.pop();
            prop_assert_eq!(verify(&secret(), &header, &cut, NOW), Err(Invalid::Wrong));
        }

        #[test]
        fn any_changed_byte_of_the_header_is_refused(
            place in any::<proptest::sample::Index>(),
            change in 1_u8..128,
        ) {
            let header = sign(&secret()[0], b"{}", NOW);
            let mut bytes = header.clone().into_bytes();
            let at = place.index(bytes.len());
            bytes[at] ^= change;
            let changed = String::from_utf8(bytes).unwrap();
            // Hexadecimal digits may be capitals.
            prop_assume!(changed.to_ascii_lowercase() != header);
            let refused = verify(&secret(), &changed, b"{}", NOW).is_err();
            prop_assert!(refused, "{}", changed);
        }

        #[test]
        fn nothing_makes_it_panic(header in ".{0,300}", now in any::<i64>()) {
            let refused = verify(&secret(), &header, b"{}", now).is_err();
            prop_assert!(refused, "{}", header);
        }
    }
}
