//! E-mail addresses, valid and in one spelling.

use email_address::{EmailAddress, Options};

/// The longest address that mail can be sent to, in bytes (RFC 5321).
const LENGTH_MAX: usize = 254;

/// An address that identifies a user: trimmed, lower case, without a display name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Email(String);

impl Email {
    /// Reads an address as somebody typed it; `None` when it is none.
    pub fn parse(text: &str) -> Option<Self> {
        let address = text.trim().to_lowercase();
        let options = Options::default()
            .with_required_tld()
            .without_display_text()
            .without_domain_literal();
        let valid = address.len() <= LENGTH_MAX
            && !address.contains(char::is_control)
            && EmailAddress::parse_with_options(&address, options).is_ok();
        valid.then_some(Self(address))
    }

    /// The one spelling.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_mailbox_has_one_spelling() {
        for spelling in ["ada@example.org", " Ada@Example.ORG ", "ADA@EXAMPLE.ORG\n"] {
            assert_eq!(Email::parse(spelling).unwrap().as_str(), "ada@example.org");
        }
    }

    #[test]
    fn what_is_no_address_is_refused() {
        let long = format!("{}@example.org", "a".repeat(250));
        for bad in [
            "",
            " ",
            "ada",
            "ada@",
            "@example.org",
            "ada@localhost",
            "a b@example.org",
            "ada@example..org",
            "Ada <ada@example.org>",
            "ada@[127.0.0.1]",
            "ada@exa\0mple.org",
            "ada@example.org, bob@example.org",
            &long,
        ] {
            assert_eq!(Email::parse(bad), None, "{bad:?}");
        }
    }
}
