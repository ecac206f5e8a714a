#[tollway_macros::service]
struct NoTrait;

#[tollway_macros::service(name = "")]
trait Nameless {}

#[tollway_macros::service(versoin = 2)]
trait Misspelt {}

#[tollway_macros::service(version = 2, version = 3)]
trait Twice {}

#[tollway_macros::service(checked = true)]
trait CheckedHow {}

#[tollway_macros::service]
trait Generic<T> {
    async fn take(&self, value: T);
}

#[tollway_macros::service]
trait MoreThanMethods {
    type Item;
    const LIMIT: u32;
}

fn main() {}
