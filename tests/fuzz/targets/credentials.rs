//! Everything that is signed or secret, from somebody without a key: nothing may be believed, and
//! nothing may panic.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::{Corpus, fuzz_target};
use stockade::{
    auth::{
        api_key::ApiKey,
        email::Email,
        session::RefreshToken,
        token::{Secret, TokenKeys},
    },
    config::Networks,
    domain::{
        allowance::Allowances,
        money::Currency,
        receipt::ReceiptKeys,
        sealed::{DataKeys, Place},
    },
    ops::certificate,
    payments,
};
use uuid::Uuid;

const SECRET: &[u8] = b"nobody but the fuzzed code has it";
/// A point on the curve whose private key nobody kept.
const PUBLIC_KEY: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";

static TOKENS: LazyLock<TokenKeys> = LazyLock::new(|| {
    let secret = Secret {
        id: "1",
        bytes: SECRET,
    };
    TokenKeys::new(&[secret], 600).unwrap()
});
static RECEIPTS: LazyLock<ReceiptKeys> =
    LazyLock::new(|| ReceiptKeys::new(&[(1, SECRET)]).unwrap());
static SEALS: LazyLock<DataKeys> = LazyLock::new(|| DataKeys::new(&[(1, &SECRET[..32])]).unwrap());

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((which, rest)) = data.split_first() else {
        return Corpus::Reject;
    };
    let place = Place {
        column: "users.email",
        row: Uuid::nil(),
    };
    assert!(SEALS.open(1, place, rest).is_err());
    let Ok(text) = str::from_utf8(rest) else {
        return Corpus::Keep;
    };
    match which % 9 {
        0 => assert!(TOKENS.verify(text).is_err()),
        1 => assert!(RECEIPTS.verify(text).is_err()),
        2 => {
            let _ = certificate::key_id(text);
            assert!(certificate::verify(text, PUBLIC_KEY).is_err());
        }
        3 => {
            let (header, body) = text.split_once('\n').unwrap_or((text, ""));
            let secrets = [String::from_utf8_lossy(SECRET).into_owned().into()];
            assert!(payments::verify(&secrets, header, body.as_bytes(), 1_800_000_000).is_err());
        }
        4 => {
            if let Some(key) = ApiKey::parse(text) {
                assert_eq!(key.text(), text, "one key, one spelling");
            }
        }
        5 => {
            if let Some(token) = RefreshToken::parse(text) {
                assert_eq!(token.text(), text, "one token, one spelling");
            }
        }
        6 => {
            if let Some(email) = Email::parse(text) {
                assert_eq!(Email::parse(email.as_str()), Some(email), "settled at once");
            }
        }
        7 => {
            let _ = serde_json::from_value::<Networks>(text.into());
            let _ = Currency::parse(text);
        }
        _ => {
            let _ = Allowances::default().change(text);
        }
    }
    Corpus::Keep
});
