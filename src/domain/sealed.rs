//! Encryption of what names a person, with keys that can change.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use uuid::Uuid;

use super::receipt::KeyError;

/// Random bytes that one sealing takes; never the same twice.
pub type Fresh = [u8; NONCE_LEN];

/// Where something sealed belongs: elsewhere it cannot be opened, so that nobody can move it.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Table and column.
    pub column: &'static str,
    /// The row.
    pub row: Uuid,
}

impl Place {
    fn bound(self, key: u8) -> Aad<Vec<u8>> {
        let mut bytes = vec![key];
        bytes.extend_from_slice(self.row.as_bytes());
        bytes.extend_from_slice(self.column.as_bytes());
        Aad::from(bytes)
    }
}

/// It was not sealed with this key for this place, or was changed since.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what is sealed with key {0} of STOCKADE_DATA_KEYS cannot be opened with it")]
pub struct Unopened(pub u8);

struct Key {
    number: u8,
    seal: LessSafeKey,
    index: Hmac<Sha256>,
}

/// The keys in use: the first seals, all open. None by default.
#[derive(Default)]
pub struct DataKeys {
    keys: Vec<Key>,
    /// What is new stays plain; keys only open what is left from before.
    plain: bool,
}

impl fmt::Debug for DataKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.numbers()).finish()
    }
}

impl DataKeys {
    /// Keys by their numbers, 1 to 255; the first seals.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn new(secrets: &[(u8, &[u8])]) -> Result<Self, KeyError> {
        KeyError::check(secrets)?;
        let keys = secrets.iter().map(|&(number, secret)| {
            let bytes = secret.len();
            let weak = KeyError::Weak { number, bytes };
            // HMAC takes keys of any length, and gives as many bytes as the cipher wants.
            let derived = |purpose: &[u8]| {
                let mut mac = Hmac::<Sha256>::new_from_slice(secret).map_err(|_| weak)?;
                mac.update(purpose);
                Ok::<_, KeyError>(mac.finalize().into_bytes())
            };
            let seal = UnboundKey::new(&AES_256_GCM, &derived(b"stockade data key: seal")?);
            let index = Hmac::new_from_slice(&derived(b"stockade data key: index")?);
            Ok(Key {
                number,
                seal: LessSafeKey::new(seal.map_err(|_| weak)?),
                index: index.map_err(|_| weak)?,
            })
        });
        let keys = keys.collect::<Result<_, _>>()?;
        Ok(Self { keys, plain: false })
    }

    /// The same keys, none of which seals any more.
    #[must_use]
    pub fn only_open(self) -> Self {
        Self {
            plain: true,
            ..self
        }
    }

    fn first(&self) -> Option<&Key> {
        self.keys.first().filter(|_| !self.plain)
    }

    /// The number of the key that seals; `None` if nothing is sealed.
    pub fn sealing(&self) -> Option<u8> {
        self.first().map(|key| key.number)
    }

    /// The numbers of all keys.
    pub fn numbers(&self) -> impl Iterator<Item = u8> {
        self.keys.iter().map(|key| key.number)
    }

    /// Seals a text for its place: the nonce, what is encrypted, and its tag. `None` without a key.
    pub fn seal(&self, place: Place, fresh: Fresh, text: &str) -> Option<Vec<u8>> {
        let key = self.first()?;
        let mut sealed = text.as_bytes().to_vec();
        let nonce = Nonce::assume_unique_for_key(fresh);
        // It fails for texts of gigabytes only.
        key.seal
            .seal_in_place_append_tag(nonce, place.bound(key.number), &mut sealed)
            .ok()?;
        Some([&fresh[..], &sealed].concat())
    }

    /// Opens what was sealed with key `number` for this place.
    ///
    /// # Errors
    /// [`Unopened`].
    pub fn open(&self, number: u8, place: Place, sealed: &[u8]) -> Result<String, Unopened> {
        let open = || {
            let key = self.keys.iter().find(|key| key.number == number)?;
            let (nonce, sealed) = sealed.split_at_checked(NONCE_LEN)?;
            let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
            let mut opened = sealed.to_vec();
            let text = key
                .seal
                .open_in_place(nonce, place.bound(number), &mut opened)
                .ok()?;
            String::from_utf8(text.to_vec()).ok()
        };
        open().ok_or(Unopened(number))
    }

    /// What a text is found by under each key, the one that seals first: without the key it says
    /// nothing but that two texts are the same.
    pub fn indexes(&self, text: &str) -> Vec<Vec<u8>> {
        let index = |key: &Key| {
            let mut mac = key.index.clone();
            mac.update(text.as_bytes());
            mac.finalize().into_bytes().to_vec()
        };
        self.keys.iter().map(index).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = Place {
        column: "users.email",
        row: Uuid::from_u128(7),
    };
    const OLD: (u8, &[u8]) = (1, b"an old secret of thirty-two byte");
    const NEW: (u8, &[u8]) = (2, b"a new secret of thirty-two bytes");

    #[test]
    fn only_its_key_opens_it_at_its_place() {
        let old = DataKeys::new(&[OLD]).unwrap();
        let sealed = old.seal(PLACE, [9; NONCE_LEN], "ada@example.org").unwrap();
        assert!(!sealed.windows(3).any(|part| part == b"ada"));
        let both = DataKeys::new(&[NEW, OLD]).unwrap();
        assert_eq!(
            (both.sealing(), format!("{both:?}")),
            (Some(2), "{2, 1}".to_owned())
        );
        assert_eq!(
            both.open(1, PLACE, &sealed).as_deref(),
            Ok("ada@example.org")
        );

        let other_row = Place {
            row: Uuid::nil(),
            ..PLACE
        };
        let other_column = Place {
            column: "users.name",
            ..PLACE
        };
        for (keys, number, place) in [
            (&both, 2, PLACE),
            (&both, 1, other_row),
            (&both, 1, other_column),
            (&DataKeys::default(), 1, PLACE),
            (&DataKeys::new(&[(1, NEW.1)]).unwrap(), 1, PLACE),
        ] {
            assert_eq!(keys.open(number, place, &sealed), Err(Unopened(number)));
        }
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert!(both.open(1, PLACE, &changed).is_err(), "byte {at}");
            assert!(both.open(1, PLACE, &sealed[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_text_is_found_by_the_same_bytes_under_every_key_that_is_left() {
        let (old, both) = (
            DataKeys::new(&[OLD]).unwrap(),
            DataKeys::new(&[NEW, OLD]).unwrap(),
        );
        let (by_old, by_both) = (
            old.indexes("ada@example.org"),
            both.indexes("ada@example.org"),
        );
        assert_eq!(by_both[1], by_old[0]);
        assert_ne!(by_both[0], by_both[1]);
        assert_ne!(by_both, both.indexes("eve@example.org"));
        assert!(DataKeys::default().indexes("ada@example.org").is_empty());
        let plain = old.only_open();
        assert_eq!(
            (plain.sealing(), plain.seal(PLACE, [0; NONCE_LEN], "x")),
            (None, None)
        );
        assert_eq!(plain.indexes("ada@example.org"), by_old);
        assert_eq!(DataKeys::default().seal(PLACE, [0; NONCE_LEN], "x"), None);
        assert!(matches!(
            DataKeys::new(&[OLD, OLD]),
            Err(KeyError::Twice(1))
        ));
        assert!(matches!(
            DataKeys::new(&[(1, b"short")]),
            Err(KeyError::Weak { .. })
        ));
    }
}
