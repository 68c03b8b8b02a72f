//! Where a request comes from: the socket's other end, or whom a trusted proxy there speaks for.

use std::net::{IpAddr, SocketAddr};

use axum::http::{
    HeaderMap, HeaderName,
    header::{AsHeaderName, FORWARDED},
};

use crate::config::Networks;

/// Where proxies write whom they speak for.
pub(super) const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// The address of the client.
///
/// Each proxy appends whom it has heard the request from. So the list is read from its end, one
/// trusted proxy after the other, up to the first address that is none: whatever stands before it,
/// that one may have made up. `Forwarded` counts only without `X-Forwarded-For`.
pub(super) fn address(peer: IpAddr, headers: &HeaderMap, trusted: &Networks) -> IpAddr {
    let mut client = peer.to_canonical();
    if !trusted.contain(client) {
        return client;
    }
    let mut follow = |hops: &mut dyn Iterator<Item = Option<IpAddr>>| {
        // What cannot be read is not believed: the proxy that passed it on is all that is known.
        while let (true, Some(Some(hop))) = (trusted.contain(client), hops.next()) {
            client = hop.to_canonical();
        }
    };
    if headers.contains_key(X_FORWARDED_FOR) {
        follow(&mut from_the_end(headers, X_FORWARDED_FOR).map(plain));
    } else {
        follow(&mut from_the_end(headers, FORWARDED).map(forwarded));
    }
    client
}

/// Whether a request has most likely come through a proxy on this machine or in its network that
/// nobody has configured.
pub(super) fn looks_like_a_proxy(peer: IpAddr, headers: &HeaderMap, trusted: &Networks) -> bool {
    let near = match peer.to_canonical() {
        IpAddr::V4(peer) => peer.is_loopback() || peer.is_private(),
        IpAddr::V6(peer) => peer.is_loopback() || peer.is_unique_local(),
    };
    near && headers.contains_key(X_FORWARDED_FOR) && !trusted.contain(peer)
}

/// The entries of a list that may be spread over several lines, the last first.
fn from_the_end(headers: &HeaderMap, name: impl AsHeaderName) -> impl Iterator<Item = &str> {
    let lines = headers.get_all(name).iter().collect::<Vec<_>>();
    lines.into_iter().rev().flat_map(|line| {
        // A line that is no text has one entry that cannot be read.
        line.to_str().unwrap_or_default().rsplit(',').map(str::trim)
    })
}

/// An address, perhaps with a port.
fn plain(text: &str) -> Option<IpAddr> {
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    let alone = bare.unwrap_or(text).parse().ok();
    alone.or_else(|| text.parse().ok().map(|address: SocketAddr| address.ip()))
}

/// The `for` of an entry of `Forwarded`.
fn forwarded(entry: &str) -> Option<IpAddr> {
    let value = entry.split(';').find_map(|pair| {
        let (name, value) = pair.split_once('=')?;
        name.trim().eq_ignore_ascii_case("for").then_some(value)
    })?;
    plain(value.trim().trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trusted(list: &str) -> Networks {
        serde_json::from_value(list.into()).unwrap()
    }

    #[test]
    fn a_client_is_the_last_one_that_no_trusted_proxy_vouches_for() {
        let proxies = trusted("10.0.0.0/8, 192.0.2.7, fd00::/8");
        for (peer, lines, expected) in [
            // Nobody is trusted but the proxies, whatever he says.
            (
                "203.0.113.5",
                &[("x-forwarded-for", "198.51.100.1")][..],
                "203.0.113.5",
            ),
            (
                "203.0.113.5",
                &[("forwarded", "for=198.51.100.1")],
                "203.0.113.5",
            ),
            (
                "192.0.2.8",
                &[("x-forwarded-for", "198.51.100.1")],
                "192.0.2.8",
            ),
            // One proxy, then two.
            (
                "10.0.0.1",
                &[("x-forwarded-for", "203.0.113.5")],
                "203.0.113.5",
            ),
            (
                "10.0.0.1",
                &[("x-forwarded-for", "203.0.113.5, 192.0.2.7")],
                "203.0.113.5",
            ),
            // What the client itself has sent stands before what the proxy has seen.
            (
                "10.0.0.1",
                &[("x-forwarded-for", "1.1.1.1, 203.0.113.5")],
                "203.0.113.5",
            ),
            (
                "10.0.0.1",
                &[("x-forwarded-for", "10.0.0.9, 203.0.113.5, 10.2.0.1")],
                "203.0.113.5",
            ),
            (
                "10.0.0.1",
                &[
                    ("x-forwarded-for", "1.1.1.1"),
                    ("x-forwarded-for", "203.0.113.5"),
                ],
                "203.0.113.5",
            ),
            // Nothing to believe: the proxy itself.
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &[("x-forwarded-for", "")], "10.0.0.1"),
            (
                "10.0.0.1",
                &[("x-forwarded-for", "203.0.113.5, unknown")],
                "10.0.0.1",
            ),
            (
                "10.0.0.1",
                &[("x-forwarded-for", "1.1.1.1, nonsense, 192.0.2.7")],
                "192.0.2.7",
            ),
            ("10.0.0.1", &[("x-forwarded-for", "10.0.0.2")], "10.0.0.2"),
            // Ports, brackets, and IPv4 in the clothes of IPv6.
            (
                "::ffff:10.0.0.1",
                &[("x-forwarded-for", "203.0.113.5:4711")],
                "203.0.113.5",
            ),
            (
                "fd00::1",
                &[("x-forwarded-for", "[2001:db8::5]:4711")],
                "2001:db8::5",
            ),
            (
                "fd00::1",
                &[("x-forwarded-for", "[2001:db8::5]")],
                "2001:db8::5",
            ),
            (
                "10.0.0.1",
                &[("x-forwarded-for", "::ffff:203.0.113.5")],
                "203.0.113.5",
            ),
            ("::ffff:203.0.113.5", &[], "203.0.113.5"),
            // The other header, only where the first is not.
            (
                "10.0.0.1",
                &[(
                    "forwarded",
                    "for=1.1.1.1, For=\"[2001:db8::5]:80\";proto=https",
                )],
                "2001:db8::5",
            ),
            (
                "10.0.0.1",
                &[("forwarded", "proto=https;for=203.0.113.5")],
                "203.0.113.5",
            ),
            ("10.0.0.1", &[("forwarded", "for=_hidden")], "10.0.0.1"),
            (
                "10.0.0.1",
                &[
                    ("forwarded", "for=1.1.1.1"),
                    ("x-forwarded-for", "203.0.113.5"),
                ],
                "203.0.113.5",
            ),
        ] {
            let mut headers = HeaderMap::new();
            for (name, value) in lines {
                headers.append(*name, value.parse().unwrap());
            }
            let client = address(peer.parse().unwrap(), &headers, &proxies);
            assert_eq!(
                client,
                expected.parse::<IpAddr>().unwrap(),
                "{peer} {lines:?}"
            );
        }
        let nobody = Networks::default();
        let headers = HeaderMap::from_iter([(X_FORWARDED_FOR, "1.1.1.1".parse().unwrap())]);
        let local = [127, 0, 0, 1].into();
        assert_eq!(address(local, &headers, &nobody), local);
    }
}
