//! Generates tonic's client and server from a description in Rust, so that no protobuf compiler is needed.

use tonic_build::manual::{Builder, Method, Service};

fn main() {
    let method = |name: &str, route: &str, input: &str, output: &str| {
        let codec = "tonic_prost::ProstCodec";
        Method::builder().name(name).route_name(route).input_type(input).output_type(output).codec_path(codec)
    };
    let echo = method("echo", "Echo", "crate::tonic::Blob", "crate::tonic::Blob").build();
    let items = method("items", "Items", "crate::tonic::Items", "crate::tonic::Blob").server_streaming().build();
    Builder::new().compile(&[Service::builder()
        .name("Peer")
        .package("tollway.peers")
        .method(echo)
        .method(items)
        .build()]);
}
