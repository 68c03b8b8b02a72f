//! What a request costs, who pays for it, and how whoever cannot is told.

use std::{convert::Infallible, fmt::Write, net::IpAddr};

use axum::{
    extract::FromRequestParts,
    http::{Extensions, HeaderMap, HeaderName, HeaderValue, request},
};
use uuid::Uuid;

use super::{
    problem::{Code, Problem},
    routes::Access,
};
use crate::throttle::{Class, Exceeded, Throttle};

/// The headers of draft-ietf-httpapi-ratelimit-headers-09: the limit, and what is left of it.
pub(super) const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
pub(super) const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");

/// What a request is, and what it costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Charge {
    pub(super) class: Class,
    pub(super) cost: u32,
}

impl Charge {
    /// Of what is at no address that is known.
    pub(super) const UNMATCHED: Self = Self {
        class: Class::Read,
        cost: 1,
    };

    /// Of the requests to a template that read, or of those that do not. What watches over a node
    /// is free.
    pub(super) fn of(access: Access, reads: bool, path: &str) -> Option<Self> {
        let path = path.strip_prefix("/v1")?;
        let class = match path {
            "/auth/login" => Class::Login,
            "/auth/register" => Class::Register,
            "/webhooks/{gateway}" => Class::Webhook,
            "/sales/{id}/orders" | "/cart/checkout" | "/sales/{id}/waitlist" if !reads => {
                Class::Purchase
            }
            "/events" | "/sales/{id}/events" | "/me/events" => Class::Stream,
            _ if matches!(access, Access::Operator | Access::Internal) => Class::Operate,
            _ if reads => Class::Read,
            _ => Class::Write,
        };
        let cost = match path {
            // Two passwords to hash; a whole table; a picture to paint.
            "/auth/password" | "/sales/{id}/orders.csv" | "/products/{id}/images" => 10,
            _ => 1,
        };
        Some(Self { class, cost })
    }
}

/// Who asks, as far as limits are concerned: in the extensions of every request.
#[derive(Clone)]
pub(super) struct Asker {
    pub(super) throttle: Throttle,
    /// `None` in tests without a socket.
    pub(super) address: Option<IpAddr>,
    pub(super) charge: Option<Charge>,
}

impl Asker {
    /// Lets the address pay.
    pub(super) fn pay(&self) -> Result<(), Problem> {
        let (Some(address), Some(charge)) = (self.address, self.charge) else {
            return Ok(());
        };
        let paid = self.throttle.address(address, charge.class, charge.cost);
        Ok(paid?)
    }
}

impl<S: Sync> FromRequestParts<S> for Asker {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut request::Parts, _: &S) -> Result<Self, Infallible> {
        // The edge has put it there.
        let asker = parts.extensions.get().cloned();
        Ok(asker.unwrap_or_else(|| Self {
            throttle: Throttle::off(),
            address: None,
            charge: None,
        }))
    }
}

/// Lets a user pay who is known by now.
pub(super) fn user(extensions: &Extensions, user: Uuid) -> Result<(), Problem> {
    if let Some(asker) = extensions.get::<Asker>()
        && let Some(charge) = asker.charge
    {
        asker.throttle.user(user, charge.class, charge.cost)?;
    }
    Ok(())
}

impl From<Exceeded> for Problem {
    fn from(exceeded: Exceeded) -> Self {
        Self::new(Code::RateLimited, "That was too often.")
            .after(exceeded.wait)
            .limited(exceeded)
    }
}

/// Tells the limit: `q` of it in `w` seconds, `r` left, more in `t` seconds.
pub(super) fn tell(exceeded: &Exceeded, headers: &mut HeaderMap) {
    let name = exceeded.rule.word();
    let seconds = |us: u128| us.div_ceil(1_000_000);
    let mut write = |header: HeaderName, parameters: [(char, u128); 2]| {
        let mut text = format!("\"{name}\"");
        for (parameter, value) in parameters {
            // Writing into a string cannot fail.
            let _ = write!(text, ";{parameter}={value}");
        }
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.insert(header, value);
        }
    };
    let allowance = exceeded.allowance;
    let window = seconds(allowance.whole_us().into());
    write(
        RATE_LIMIT_POLICY,
        [('q', allowance.at_once().into()), ('w', window)],
    );
    let wait = seconds(exceeded.wait.as_micros());
    write(RATE_LIMIT, [('r', exceeded.left.into()), ('t', wait)]);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::domain::allowance::Rule;

    #[test]
    fn a_limit_is_told_as_the_draft_says() {
        let exceeded = Exceeded {
            rule: Rule::UserPurchase,
            allowance: "20+3/s".parse().unwrap(),
            left: 0,
            wait: Duration::from_millis(1_001),
        };
        let mut headers = HeaderMap::new();
        tell(&exceeded, &mut headers);
        assert_eq!(headers[RATE_LIMIT_POLICY], "\"user.purchase\";q=20;w=7");
        assert_eq!(headers[RATE_LIMIT], "\"user.purchase\";r=0;t=2");
    }
}
