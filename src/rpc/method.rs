//! Methods by id.

use std::fmt;

use keccak_const::Keccak256;

/// The id of a method: the first 8 bytes, big-endian, of keccak256 over `service/version/method`.
///
/// A new version of a service has new ids, so that nobody takes one version's arguments for another's.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MethodId(pub u64);

impl MethodId {
    /// The id of a method of a version of a service. As a constant it costs nothing at run time.
    ///
    /// ```
    /// use tollway::rpc::MethodId;
    ///
    /// const GREET: MethodId = MethodId::of("greeter", 1, "greet");
    /// assert_ne!(GREET, MethodId::of("greeter", 2, "greet"));
    /// ```
    pub const fn of(service: &str, version: u32, method: &str) -> Self {
        let (digits, first) = decimal(version);
        let hash = Keccak256::new().update(service.as_bytes()).update(b"/");
        let hash = hash.update(digits.split_at(first).1).update(b"/").update(method.as_bytes()).finalize();
        let [a, b, c, d, e, f, g, h, ..] = hash;
        MethodId(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    }
}

impl fmt::Debug for MethodId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MethodId({:#018x})", self.0)
    }
}

/// A method of a service as both sides know it by name. `#[tollway::service]` makes one for each of a trait's methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Method {
    service: &'static str,
    name: &'static str,
    id: MethodId,
    idempotent: bool,
}

impl Method {
    /// A method of a version of a service.
    pub const fn of(service: &'static str, version: u32, name: &'static str) -> Self {
        Method { service, name, id: MethodId::of(service, version, name), idempotent: false }
    }

    /// Says that the method may be executed twice where once was wanted, and does no harm.
    #[must_use]
    pub const fn idempotent(self) -> Self {
        Method { idempotent: true, ..self }
    }

    /// The service's name.
    pub const fn service(&self) -> &'static str {
        self.service
    }

    /// The method's name.
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The method's id on the wire.
    pub const fn id(&self) -> MethodId {
        self.id
    }

    /// Whether it may be executed twice.
    pub const fn is_idempotent(&self) -> bool {
        self.idempotent
    }
}

/// A number in decimal digits, and where the first of them stands.
const fn decimal(mut number: u32) -> ([u8; 10], usize) {
    let mut digits = [b'0'; 10];
    let mut first = digits.len();
    loop {
        first -= 1;
        digits[first] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return (digits, first);
        }
    }
}

#[cfg(test)]
mod tests {
    use tollway_protocol::payment::keccak256;

    use super::*;

    #[test]
    fn an_id_is_the_hash_of_service_version_and_method() {
        for (service, version, method) in [("greeter", 1, "greet"), ("", 0, ""), ("a/b", u32::MAX, "c"), ("x", 10, "y")]
        {
            let hash = keccak256(format!("{service}/{version}/{method}").as_bytes());
            let first = u64::from_be_bytes(hash.0[..8].try_into().expect("eight bytes"));
            assert_eq!(MethodId::of(service, version, method), MethodId(first), "{service}/{version}/{method}");
        }
    }
}
